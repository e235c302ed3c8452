"""Where a patch is: position embeddings for a grid of patches, learned and resampled or computed, for any grid.

A grid is (rows, columns); patches are in row-major order. Each computed embedding has one band of frequencies for the
row and one for the column: base^(-i/n) for i of n bands.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F

__all__ = ["resample_grid", "rotary_embedding", "rotate", "sincos_embedding"]

SINCOS_BASE = 10_000.0  # MAE (He et al., 2021)
ROTARY_BASE = 100.0  # RoPE-ViT's axial form (Heo et al., 2024)


def resample_grid(embedding: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """A learned embedding (1, n * n, dim) of a square grid for another grid: (1, rows * columns, dim), same dtype.

    Bicubic without antialiasing, as ViT's and DeiT's fine-tuning does it; differentiable.
    """
    side = round(embedding.shape[1] ** 0.5)
    assert side * side == embedding.shape[1], embedding.shape
    if grid == (side, side):
        return embedding
    image = embedding.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return F.interpolate(image, size=grid, mode="bicubic").flatten(2).transpose(1, 2)


def sincos_embedding(grid: tuple[int, int], dim: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """2-D sine-cosine embedding, fixed (MAE): (rows * columns, dim), channels in timm's order. `dim` is 4 n."""
    return _kept(_sincos, grid, dim, device, dtype)


def rotary_embedding(
    grid: tuple[int, int], num_prefix: int, dim: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Cosines and sines for `rotate`: (2, num_prefix + rows * columns, dim / 2). `dim`, one head's, is 4 n.

    The first `num_prefix` tokens are not patches: their angle is 0, and `rotate` leaves them as they are, to the bit.
    """
    return _kept(_rotary, grid, num_prefix, dim, device, dtype)


def rotate(x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (Su et al., 2021), axial: turns channels i and i + dim / 2 of x (B, heads, tokens, dim).

    Computed in the embedding's dtype (float32 or wider), returned in x's.
    """
    cos, sin = embedding.unbind()
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


def _kept(make: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """What `make` returns; outside compilation it is kept, so that a step computes nothing and waits for nothing."""
    if torch.compiler.is_compiling():  # also while exporting: the compiler fuses it or folds it into a constant
        return make(*arguments)
    return _cached(make, *arguments)


@lru_cache(maxsize=32)
def _cached(make: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    with torch.inference_mode(False):  # made during an evaluation, it must still do for training
        return make(*arguments)


def _angles(
    grid: tuple[int, int], num_bands: int, base: float, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """(rows * columns, 2 * num_bands): the row's angles, then the column's."""
    rows, columns = grid
    bands = base ** (-torch.arange(num_bands, device=device, dtype=dtype) / num_bands)
    row = torch.arange(rows, device=device, dtype=dtype)[:, None, None] * bands
    column = torch.arange(columns, device=device, dtype=dtype)[None, :, None] * bands
    return torch.cat([row.expand(-1, columns, -1), column.expand(rows, -1, -1)], dim=2).flatten(0, 1)


def _sincos(grid: tuple[int, int], dim: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    angles = _angles(grid, dim // 4, SINCOS_BASE, device, dtype)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _rotary(grid: tuple[int, int], num_prefix: int, dim: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    angles = F.pad(_angles(grid, dim // 4, ROTARY_BASE, device, dtype), (0, 0, num_prefix, 0))
    return torch.stack([angles.cos(), angles.sin()])
