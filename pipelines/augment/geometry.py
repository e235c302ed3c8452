"""Shears, shifts and rotations of a batch, each sample by its own inverse affine matrix, in one resampling pass."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import grid_sample

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
    grid = (x * of_x + y.unsqueeze(1) * of_y).add_(shift).permute(0, 2, 3, 1)
    if not any(fill):
        return grid_sample(images.float(), grid, mode=interpolation, align_corners=False).round_().to(torch.uint8)
    covered = torch.ones(len(images), 1, height, width, device=images.device)
    sampled = grid_sample(torch.cat([images.float(), covered], 1), grid, mode=interpolation, align_corners=False)
    pixels, covered = sampled[:, :3], sampled[:, 3:]
    outside = torch.tensor(fill, device=images.device).view(1, 3, 1, 1)
    if interpolation == "nearest":
        return torch.where(covered < 0.5, outside, pixels).round_().to(torch.uint8)
    return pixels.sub_(outside).mul_(covered).add_(outside).round_().to(torch.uint8)
