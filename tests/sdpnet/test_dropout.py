"""Dropout by hash: its masks are those of a plain computation in NumPy, and they look random in all directions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from sdpnet.model.dropout import Dropout, draw_keys, dropped, hash_dropout, split_keys, threshold
from sdpnet.model.sdpnet import SdPNet, create_model

CPU = torch.device("cpu")


def drawn(layers: int = 1, rows: int = 512, width: int = 384, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return draw_keys(layers, rows, width, CPU)


def masks(keys: torch.Tensor, rate: float, rows: int = 512, width: int = 384) -> np.ndarray:
    """The masks of all layers and places, float64 (layers, 2, rows, width): 1 where an element is dropped."""
    found = [[dropped(*split_keys(key, rows, width), rate) for key in layer] for layer in keys]
    return np.array([[mask.numpy() for mask in layer] for layer in found], dtype=np.float64)


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5, 0.999])
def test_bits_are_those_of_numpy(rate: float) -> None:
    keys = drawn()
    rows, columns = (half.numpy().view(np.uint32) for half in split_keys(keys[0, 0], 512, 384))
    value = (rows[:, None] ^ columns).astype(np.uint64) * 0x7FEB352D & 0xFFFFFFFF
    value = (value ^ value >> 15) * 0x846CA68B & 0xFFFFFFFF
    # As a signed number, what is below -2**31 + x is, without its sign bit, from 2**31 on.
    expected = (value ^ 0x80000000) < round(rate * 2**32)
    assert np.array_equal(masks(keys, rate)[0, 0], expected)


def test_thresholds() -> None:
    assert threshold(0.5) == 0
    assert threshold(0.0) == -(2**31)
    assert threshold(1 - 1e-12) == 2**31 - 1


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5])
def test_rates(rate: float) -> None:
    """The rate of all elements, of each row and of each column is within what chance allows."""
    dropped = masks(drawn(layers=3), rate)
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs(dropped.mean() - rate) <= 5 * deviation / dropped.size**0.5
    for axis in (2, 3):
        of_lines, length = dropped.mean(axis=axis), dropped.shape[axis]
        scores = (of_lines - rate) / deviation * length**0.5
        assert abs(scores).max() <= 5.5
        # The sum of the squares is chi-square distributed: its mean is the number of lines, its variance twice that.
        assert abs((scores**2).sum() - scores.size) <= 5 * (2 * scores.size) ** 0.5


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation in standard deviations of its estimate."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1] * a.size**0.5)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_independent_of_neighbours_layers_steps_and_seeds(rate: float) -> None:
    dropped, other_seed = masks(drawn(layers=3), rate), masks(drawn(seed=1), rate)
    one = dropped[0, 0]
    for rows, columns in itertools.product((0, 1, 2, 7, 64), repeat=2):
        if rows or columns:
            assert abs(correlation(one[rows:, columns:], one[: 512 - rows, : 384 - columns])) <= 5
    others = [dropped[0, 1], dropped[1, 0], dropped[2, 1], other_seed[0, 0]]
    assert all(abs(correlation(one, other)) <= 5 for other in others)


def test_rows_and_columns_in_pairs() -> None:
    """Each pair of rows, and each of columns, is uncorrelated, and so is each element with its three mirror images.

    A hash that is linear in its bits fails the last part: there, three corners of a rectangle decide the fourth.
    """
    signs = 2 * masks(drawn(), 0.5)[0, 0] - 1
    for lines in (signs, signs.T):
        pairs = lines @ lines.T / lines.shape[1] ** 0.5
        scores = pairs[np.triu_indices(len(lines), 1)]
        assert abs(scores).max() <= 6
        assert abs(scores.var() - 1) <= 0.05
    corners = signs[:-1, :-1] * signs[1:, :-1] * signs[:-1, 1:] * signs[1:, 1:]
    assert abs(corners.mean()) * corners.size**0.5 <= 5


def test_patterns_of_eight_neighbours_are_equally_frequent() -> None:
    """A chi-square test with 255 degrees of freedom."""
    bits = masks(drawn(), 0.5)[0, 0].reshape(-1, 8)
    counts = np.bincount((bits @ 2 ** np.arange(8)).astype(int), minlength=256)
    expected = len(bits) / 256
    assert abs(((counts - expected) ** 2 / expected).sum() - 255) <= 5 * (2 * 255) ** 0.5


@pytest.mark.parametrize("rate", [0.2, 0.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_mean_and_variance_are_those_of_torch(rate: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 400, dtype=dtype) + 1
    ours, theirs = Dropout(rate)(x), nn.Dropout(rate)(x)
    assert ours.dtype == dtype
    kept = ours != 0
    assert torch.equal(ours[kept], (x * (1 / (1 - rate)))[kept])
    assert abs(ours.double().mean() - theirs.double().mean()) <= 0.03
    assert abs(ours.double().var() / theirs.double().var() - 1) <= 0.03


def test_without_dropout_it_is_the_identity() -> None:
    x = torch.randn(3, 4)
    assert Dropout(0.0)(x) is x
    assert Dropout(0.5).eval()(x) is x
    assert isinstance(Dropout(0.5), nn.Dropout)


def test_gradients_and_what_is_kept_for_them() -> None:
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    keys = drawn(rows=6, width=8)[0, 0]
    assert torch.autograd.gradcheck(lambda x: hash_dropout(x, keys, 0.4), x)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = hash_dropout(x, keys, 0.4)
    assert sum(tensor.numel() for tensor in kept) == 6 + 8
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient == 0, out == 0)


def test_compiled_it_is_the_same_and_no_mask_is_kept() -> None:
    keys = drawn(rows=80, width=256)[0, 0]
    x = torch.randn(2, 40, 256, requires_grad=True)
    kept: list[torch.Tensor] = []
    compiled = torch.compile(lambda x: hash_dropout(x.sin(), keys, 0.4).cos(), backend="aot_eager_decomp_partition")
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = compiled(x)
    expected = hash_dropout(x.sin(), keys, 0.4).cos()
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(out.sum(), x)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert kept and all(tensor.dtype != torch.bool for tensor in kept)


def model_with_dropout(**options: object) -> SdPNet:
    torch.manual_seed(0)
    return create_model("sdpnet_tiny", 5, dim=32, heads=2, conv_blocks=1, dropout=0.5, **options)


def test_draws_follow_from_torchs_seed_and_differ_between_passes() -> None:
    model, images = model_with_dropout(), torch.randn(2, 3, 32, 32)
    torch.manual_seed(7)
    first, second = model(images), model(images)
    torch.manual_seed(7)
    assert torch.equal(model(images), first) and not torch.equal(second, first)


def test_blocks_and_dropouts_of_one_pass_draw_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with_dropout(transformer_blocks=3)
    seen: list[torch.Tensor] = []
    for block in model.transformer_blocks:
        for module in block.modules():
            if isinstance(module, Dropout):
                module.register_forward_hook(lambda module, inputs, out: seen.append((out == 0)[..., :32]))
    model(torch.randn(4, 3, 64, 64))
    assert len(seen) == 6
    for a, b in itertools.combinations(seen, 2):
        assert abs(correlation(a.double().numpy(), b.double().numpy())) <= 5


def test_recomputed_activations_drop_the_same() -> None:
    model, images = model_with_dropout(), torch.randn(2, 3, 32, 32)
    gradients = []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(3)
        model(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)
