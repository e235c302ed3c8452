from __future__ import annotations

import pytest
import torch
from timm.layers import apply_rot_embed, build_rotary_pos_embed, build_sincos2d_pos_embed, resample_abs_pos_embed

from sdpnet.model.positions import resample_grid, rotary_embedding, rotate, sincos_embedding

CPU = torch.device("cpu")
GRIDS = [(1, 1), (4, 4), (14, 14), (3, 7), (24, 12)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("side", [1, 4, 14])
def test_resampling_is_timms(side: int, grid: tuple[int, int]) -> None:
    embedding = torch.randn(1, side * side, 12)
    theirs = resample_abs_pos_embed(embedding, list(grid), [side, side], num_prefix_tokens=0, antialias=False)
    assert torch.equal(resample_grid(embedding, grid), theirs)


@pytest.mark.parametrize("grid", GRIDS)
def test_sincos_is_timms(grid: tuple[int, int]) -> None:
    theirs = build_sincos2d_pos_embed(list(grid), 48)
    assert torch.allclose(sincos_embedding(grid, 48, CPU, torch.float32), theirs, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_rotation_is_timms_in_patches_and_none_in_leading_tokens(grid: tuple[int, int]) -> None:
    sin, cos = build_rotary_pos_embed(list(grid), dim=24, temperature=100.0, in_pixels=False)
    x = torch.randn(2, 3, 5 + grid[0] * grid[1], 24)
    ours = rotate(x, rotary_embedding(grid, 5, 24, CPU, torch.float32))
    assert torch.equal(ours[:, :, :5], x[:, :, :5])
    # Ours turns channels i and i + 12 together, timm's 2i and 2i + 1: the form that all its versions have.
    theirs = apply_rot_embed(x[:, :, 5:].unflatten(-1, (2, 12)).transpose(-1, -2).flatten(-2), sin, cos)
    theirs = theirs.unflatten(-1, (12, 2)).transpose(-1, -2).flatten(-2)
    assert torch.allclose(ours[:, :, 5:], theirs, atol=1e-5)


def test_scores_depend_on_the_distance_alone() -> None:
    """What a rotary embedding is for: moving both patches alike changes no product of query and key."""
    embedding = rotary_embedding((9, 8), 0, 16, CPU, torch.float64)
    q, k = torch.randn(2, 16, dtype=torch.float64)
    every_q, every_k = (rotate(t.expand(1, 1, 72, 16), embedding).view(9, 8, 16) for t in (q, k))
    products = [(every_q[row, column] * every_k[row + 3, column + 2]).sum() for row in range(6) for column in range(6)]
    assert torch.stack(products).allclose(products[0])
    assert not (every_q[0, 0] * every_k[2, 3]).sum().isclose(products[0])


def test_the_turn_is_computed_in_float32_and_returned_in_half() -> None:
    embedding = rotary_embedding((14, 14), 1, 16, CPU, torch.float32)
    x = torch.randn(1, 2, 197, 16).bfloat16()
    assert torch.equal(rotate(x, embedding), rotate(x.float(), embedding).bfloat16())
