from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sdpnet.pipelines.planning.crop_boxes import first_fitting_boxes
from sdpnet.pipelines.planning.draws import Permutation, beta_quantile, derive_seed, uniforms

MASK = (1 << 64) - 1
SIGNIFICANCE = 1e-6  # chance of a false alarm in each statistical test; the draws are fixed, so none is flaky


def splitmix64(state: int, count: int) -> list[int]:
    """The published generator (Vigna's reference in C), step by step in Python integers."""
    outputs = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        outputs.append(z ^ (z >> 31))
    return outputs


@pytest.mark.parametrize("key", [0, 1, 1234567, MASK])
def test_uniforms_are_the_splitmix64_sequence(key: int) -> None:
    expected = [(z >> 11) * 2.0**-53 for z in splitmix64(key, 3 * 64)]
    got = uniforms(key, np.arange(3), 64)
    assert got.ravel().tolist() == expected
    assert uniforms(key, np.array([2]), 5, first=7)[0].tolist() == expected[2 * 64 + 7 : 2 * 64 + 12]


def test_splitmix64_known_values() -> None:
    # from the reference implementation's seed 1234567 (https://prng.di.unimi.it/splitmix64.c)
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniforms_are_uniform_and_independent_of_their_neighbours() -> None:
    u = uniforms(derive_seed(5, 1, 2), np.arange(50_000), 4)
    assert stats.kstest(u.ravel(), "uniform").pvalue > SIGNIFICANCE
    for other in (u[1:, 0], u[:-1, 1]):
        assert stats.pearsonr(u[:-1, 0], other).pvalue > SIGNIFICANCE


def test_seeds_differ_in_every_part_and_its_place() -> None:
    seeds = {derive_seed(s, a, b) for s in (-1, 0, 1, 2) for a in (0, 1, 2) for b in (0, 1, 2)}
    assert len(seeds) == 36
    assert derive_seed(0) != derive_seed(0, 0) != derive_seed(0, 0, 0)


@given(n=st.integers(1, 5000), key=st.integers(0, MASK))
def test_permutation_is_a_bijection(n: int, key: int) -> None:
    permutation = Permutation(n, key)
    image = permutation(np.arange(n))
    assert np.array_equal(np.sort(image), np.arange(n))
    some = np.arange(0, n, 7)
    assert np.array_equal(permutation(some), image[some])


def test_permutations_are_uniform_over_positions() -> None:
    """Over many keys, every element reaches every position equally often, and so do pairs of neighbours."""
    n, keys = 12, 24_000
    images = np.stack([Permutation(n, derive_seed(key))(np.arange(n)) for key in range(keys)])
    for position in range(n):
        assert stats.chisquare(np.bincount(images[:, position], minlength=n)).pvalue > SIGNIFICANCE
    pairs = np.bincount(images[:, 0] * n + images[:, 1], minlength=n * n)[~np.eye(n, dtype=bool).ravel()]
    assert stats.chisquare(pairs).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.4, 0.8, 1.0, 2.0])
def test_beta_quantile_equals_scipy(alpha: float) -> None:
    u = np.concatenate([np.linspace(0, 1, 4001), [1e-9, 1 - 1e-9]])
    assert np.abs(beta_quantile(u, alpha) - stats.beta.ppf(u, alpha, alpha)).max() < 1e-6


def test_boxes_fit_and_fail_where_none_can() -> None:
    sizes = np.array([[10, 10], [1, 100]])
    boxes, found = first_fitting_boxes(sizes, 1, np.array([0, 1]), (0.9, 0.9), (1.0, 1.0), proper=False)
    assert found.tolist() == [True, False]
    assert boxes[0, 2] == boxes[0, 3] == 9 and boxes[1].tolist() == [0, 0, 0, 0]
