"""Shears, shifts and rotations of a batch, each sample by its own inverse affine matrix, in one resampling pass."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import grid_sample

from pipelines.augment.filters import to_levels
from pipelines.policies import Operation

__all__ = ["GEOMETRIC", "affine_matrices", "resample"]

GEOMETRIC = (
    Operation.SHEAR_X,
    Operation.SHEAR_Y,
    Operation.TRANSLATE_X,
    Operation.TRANSLATE_Y,
    Operation.ROTATE,
)


def affine_matrices(operations: np.ndarray, magnitudes: np.ndarray, height: int, width: int) -> np.ndarray:
    """float32 (B, 2, 3): where the pixels of the result come from, in half-sizes about the image's centre, as a
    function of (x, y, 1) in pixels about it.

    `operations` (B,) are of `GEOMETRIC`. Shears fix the top left corner, rotations the centre, as torchvision's
    RandAugment has it.
    """
    m = magnitudes.astype(np.float64)
    matrices = np.tile(np.eye(2, 3), (len(m), 1, 1))
    shear_x, shear_y = operations == Operation.SHEAR_X, operations == Operation.SHEAR_Y
    matrices[shear_x, 0, 1], matrices[shear_x, 0, 2] = m[shear_x], m[shear_x] * (height * 0.5)
    matrices[shear_y, 1, 0], matrices[shear_y, 1, 2] = m[shear_y], m[shear_y] * (width * 0.5)
    shift_x, shift_y = operations == Operation.TRANSLATE_X, operations == Operation.TRANSLATE_Y
    matrices[shift_x, 0, 2], matrices[shift_y, 1, 2] = -m[shift_x], -m[shift_y]
    rotate = operations == Operation.ROTATE
    angle = np.radians(m[rotate])
    matrices[rotate, 0, 0] = matrices[rotate, 1, 1] = np.cos(angle)
    matrices[rotate, 0, 1], matrices[rotate, 1, 0] = -np.sin(angle), np.sin(angle)
    return matrices.astype(np.float32) / np.array([[0.5 * width], [0.5 * height]], np.float32)


def resample(
    images: torch.Tensor, matrices: torch.Tensor, interpolation: str, fill: tuple[float, float, float]
) -> torch.Tensor:
    """Images uint8 (B, 3, H, W) through `affine_matrices`, float32 (B, 2, 3), as torchvision's `affine`.

    `interpolation` is "nearest" or "bilinear"; `fill`, levels from 0 to 255, is what lies outside. The coordinates are
    rounded to float32 where torchvision's are on a CPU, so that ties between two pixels fall alike.
    """
    height, width = images.shape[2:]
    x = torch.linspace((1.0 - width) * 0.5, (width - 1.0) * 0.5, width, device=images.device)
    y = torch.linspace((1.0 - height) * 0.5, (height - 1.0) * 0.5, height, device=images.device)
    of_x, of_y, shift = matrices[..., None, None].unbind(2)  # (B, 2, 1, 1) each
    grid = (x * of_x + y.unsqueeze(1) * of_y).add_(shift)
    if interpolation == "nearest":
        return _nearest(images, grid, fill)
    grid = grid.permute(0, 2, 3, 1)
    if not any(fill):
        return to_levels(grid_sample(images.float(), grid, align_corners=False).round_())
    covered = torch.ones(len(images), 1, height, width, device=images.device)
    sampled = grid_sample(torch.cat([images.float(), covered], 1), grid, align_corners=False)
    pixels, covered = sampled[:, :3], sampled[:, 3:]
    outside = torch.tensor(fill, device=images.device).view(1, 3, 1, 1)
    return to_levels(pixels.sub_(outside).mul_(covered).add_(outside).round_())


def _nearest(images: torch.Tensor, grid: torch.Tensor, fill: tuple[float, float, float]) -> torch.Tensor:
    """Whole pixels, packed into int32, are gathered from images with a border of the fill: half of the time of
    `grid_sample` with floats on a CPU. `grid` is (B, 2, H, W); it is written to."""
    batch, _, height, width = images.shape
    columns, rows = grid.add_(1).unbind(1)
    half = torch.full((), -0.5, device=images.device)  # add's alpha: a product that is not rounded, as in grid_sample
    columns = torch.add(half, columns, alpha=width * 0.5).round_().clamp_(-1, width).to(torch.int32)
    rows = torch.add(half, rows, alpha=height * 0.5).round_().clamp_(-1, height).to(torch.int32)
    index = rows.mul_(width + 2).add_(columns).add_(width + 3)
    red, green, blue = (round(level) for level in fill)
    colour, shape = red + 256 * green + 65536 * blue, (batch, height + 2, width + 2)
    packed = torch.full(shape, colour, dtype=torch.int32, device=images.device)
    planes = images.to(torch.int32)
    packed[:, 1:-1, 1:-1] = planes[:, 0].add_(planes[:, 1], alpha=256).add_(planes[:, 2], alpha=65536)
    pixels = packed.flatten(1).gather(1, index.flatten(1).long()).view(batch, height, width)
    out = torch.empty_like(images)
    out[:, 0], out[:, 1], out[:, 2] = pixels, pixels >> 8, pixels >> 16
    return out
