from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from sdpnet.pipelines.augment.reference.noise import counter_hashes, normal_noise
from sdpnet.pipelines.planning.draws import sample_keys

pytestmark = pytest.mark.gpu

SIGNIFICANCE = 1e-6
MASK = (1 << 64) - 1


def splitmix64(state: int, count: int) -> list[int]:
    """The published generator, step by step in Python integers."""
    outputs = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        outputs.append(z ^ (z >> 31))
    return outputs


def test_hashes_are_the_splitmix64_sequence() -> None:
    keys = [0, 1, 1234567, MASK, 1 << 63]
    signed = torch.from_numpy(np.array(keys, np.uint64).view(np.int64))
    got = counter_hashes(signed, 50).numpy().view(np.uint64)
    assert got.tolist() == [splitmix64(key, 50) for key in keys]


def test_noise_is_normal_and_independent_of_its_neighbours() -> None:
    keys = torch.from_numpy(sample_keys(5, np.arange(8)))
    noise = normal_noise(keys, (3, 64, 64))
    assert noise.shape == (8, 3, 64, 64) and noise.dtype == torch.float32 and noise.isfinite().all()
    assert stats.kstest(noise.numpy().ravel(), "norm").pvalue > SIGNIFICANCE
    for a, b in ((noise[1:], noise[:-1]), (noise[..., 1:], noise[..., :-1]), (noise[:, 1:], noise[:, :-1])):
        assert stats.pearsonr(a.numpy().ravel(), b.numpy().ravel()).pvalue > SIGNIFICANCE


def test_noise_is_each_samples_own() -> None:
    keys = torch.from_numpy(sample_keys(5, np.arange(6)))
    noise = normal_noise(keys, (3, 5, 7))
    assert torch.equal(normal_noise(keys[[4, 1]], (3, 5, 7)), noise[[4, 1]])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_another_device_makes_the_same() -> None:
    keys = torch.from_numpy(sample_keys(5, np.arange(6)))
    assert torch.equal(counter_hashes(keys.cuda(), 1000).cpu(), counter_hashes(keys, 1000))
    assert torch.allclose(normal_noise(keys.cuda(), (1000,)).cpu(), normal_noise(keys, (1000,)), atol=1e-5)
