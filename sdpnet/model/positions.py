"""Position embeddings for a grid of patches of any size: learned and resampled, or computed.

A grid is (rows, columns), with its patches in row-major order. A computed embedding has n frequencies base^(-i/n),
i = 0, ..., n - 1, for the row and the same n frequencies for the column.
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
    """Resamples a learned embedding (1, n * n, dim) of a square grid to (1, rows * columns, dim), in the same dtype.

    The interpolation is bicubic without antialiasing, as in the fine-tuning of ViT and DeiT. It is differentiable.
    """
    side = round(embedding.shape[1] ** 0.5)
    assert side * side == embedding.shape[1], embedding.shape
    if grid == (side, side):
        return embedding
    image = embedding.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return F.interpolate(image, size=grid, mode="bicubic").flatten(2).transpose(1, 2)


def sincos_embedding(grid: tuple[int, int], dim: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The fixed 2-D sine-cosine embedding of MAE: (rows * columns, dim), with the channels in timm's order.

    `dim` must be a multiple of 4.
    """
    return _kept(_sincos, grid, dim, device, dtype)


def rotary_embedding(
    grid: tuple[int, int], num_prefix: int, dim: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """The cosines and sines for `rotate`: (2, num_prefix + rows * columns, dim / 2).

    `dim` is the number of channels in one head and must be a multiple of 4. The first `num_prefix` tokens are not
    patches: their angle is 0, so that `rotate` does not change a bit of them.
    """
    return _kept(_rotary, grid, num_prefix, dim, device, dtype)


def rotate(x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """Applies an axial rotary embedding (Su et al., 2021): rotates channels i and i + dim / 2 of x.

    Args:
        x: (B, heads, tokens, dim), or any shape that `embedding` is broadcast to.
        embedding: what `rotary_embedding` returns, in float32 or wider, in which the products are computed.

    Returns:
        The same shape and dtype as x.
    """
    cos, sin = embedding.unbind()
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


def _kept(make: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """The result of `make`, which is cached so that a step does not compute it again.

    Under compilation and export it is not cached: the compiler fuses the computation or folds it into a constant.
    """
    if torch.compiler.is_compiling():
        return make(*arguments)
    return _cached(make, *arguments)


@lru_cache(maxsize=32)
def _cached(make: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    with torch.inference_mode(False):  # a tensor that is first made in an evaluation must also work in training
        return make(*arguments)


def _angles(
    grid: tuple[int, int], num_bands: int, base: float, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """The angles of the row, then those of the column: (rows * columns, 2 * num_bands)."""
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
