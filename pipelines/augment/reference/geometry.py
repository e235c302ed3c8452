"""Shears, shifts and rotates a batch in one resampling pass, each sample by its own inverse affine matrix."""

from __future__ import annotations

import numpy as np
import torch

from sdpnet.pipelines.augment.reference.filters import IN_CACHE, to_levels
from sdpnet.pipelines.planning.policies import Operation

__all__ = ["GEOMETRIC", "affine_matrices", "resample"]

GEOMETRIC = (
    Operation.SHEAR_X,
    Operation.SHEAR_Y,
    Operation.TRANSLATE_X,
    Operation.TRANSLATE_Y,
    Operation.ROTATE,
)


def affine_matrices(operations: np.ndarray, magnitudes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Inverse affine matrices, float32 (B, 2, 3), of geometric operations.

    A matrix maps (x, y, 1), where x and y are a result pixel's position in pixels from the image's centre, to the
    column and the row, counted from 0, that the pixel comes from. Shears leave the top left corner in place and
    rotations the centre, as in torchvision's RandAugment.

    Args:
        operations: (B,), members of `GEOMETRIC`.
        magnitudes: float32 (B,), in each operation's unit.
        height, width: the images' size in pixels.
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
    matrices[:, :, 2] += (width - 1) * 0.5, (height - 1) * 0.5
    return matrices.astype(np.float32)


def resample(
    images: torch.Tensor, matrices: torch.Tensor, interpolation: str, fill: tuple[float, float, float]
) -> torch.Tensor:
    """Resamples images, uint8 (B, 3, H, W), as torchvision's `affine` does.

    Coordinates are float32, in pixels, and each product and sum is rounded separately. Shifts by whole and half pixels
    are therefore exact, and the results are the same on every CPU and GPU; the nearest pixel of a tie is the one with
    the even number.

    Args:
        images: uint8 (B, 3, H, W).
        matrices: float32 (B, 2, 3), from `affine_matrices`.
        interpolation: "nearest" or "bilinear".
        fill: RGB levels, 0 to 255, of pixels outside the image.
    """
    if images.device.type == "cpu" and interpolation == "bilinear" and len(images) > IN_CACHE:
        parts = zip(images.split(IN_CACHE), matrices.split(IN_CACHE), strict=True)
        return torch.cat([resample(*part, interpolation, fill) for part in parts])
    height, width = images.shape[2:]
    x = torch.arange(width, device=images.device) - (width - 1) * 0.5
    y = torch.arange(height, device=images.device) - (height - 1) * 0.5
    of_x, of_y, shift = matrices[..., None, None].unbind(2)  # (B, 2, 1, 1) each
    source = (x * of_x + y.unsqueeze(1) * of_y).add_(shift)
    return (_nearest if interpolation == "nearest" else _bilinear)(images, source, fill)


def _packed(images: torch.Tensor, border: int, around: int, inside: int) -> torch.Tensor:
    """Packs whole pixels into int32 (B, (H + 2 border) * (W + 2 border)).

    A pixel is red + 256 green + 65,536 blue + `inside`, or `around` in the border.
    """
    # On a CPU, gathering packed pixels takes 0.56 ms for 8 images, and packing and unpacking 0.4 ms, where gathering
    # three planes takes 1.7 ms (records/LOG.md).
    batch, _, height, width = images.shape
    shape = (batch, height + 2 * border, width + 2 * border)
    packed = torch.full(shape, around, dtype=torch.int32, device=images.device)
    planes = images.to(torch.int32)
    pixels = planes[:, 0].add_(planes[:, 1], alpha=256).add_(planes[:, 2], alpha=65536)
    packed[:, border:-border, border:-border] = pixels.add_(inside) if inside else pixels
    return packed.flatten(1)


def _nearest(images: torch.Tensor, source: torch.Tensor, fill: tuple[float, float, float]) -> torch.Tensor:
    """Takes the nearest pixels. `source` (B, 2, H, W) are source columns and rows; it is overwritten."""
    batch, _, height, width = images.shape
    columns, rows = (to.round_().clamp_(-1, size).to(torch.int32) for to, size in _with_sizes(source))
    index = rows.mul_(width + 2).add_(columns).add_(width + 3)
    red, green, blue = (round(level) for level in fill)
    packed = _packed(images, 1, red + 256 * green + 65536 * blue, 0)
    pixels = packed.gather(1, index.flatten(1).long()).view(batch, height, width)
    out = torch.empty_like(images)
    out[:, 0], out[:, 1], out[:, 2] = pixels, pixels >> 8, pixels >> 16
    return out


def _bilinear(images: torch.Tensor, source: torch.Tensor, fill: tuple[float, float, float]) -> torch.Tensor:
    """Interpolates between four pixels; `source` is as in `_nearest`.

    As in torchvision, pixels outside the image count as 0, and the sum is then blended with the fill by the weights of
    the pixels inside.
    """
    batch, _, height, width = images.shape
    before = source.floor()
    after_x, after_y = source.sub_(before).unbind(1)  # weights of the pixels to the east and to the south
    columns, rows = (to.clamp_(-2, size).to(torch.int32) for to, size in _with_sizes(before))
    line, inside = width + 4, 1 << 24
    first = rows.mul_(line).add_(columns).add_(2 * line + 2).flatten(1).long()
    packed = _packed(images, 2, 0, inside)
    out = torch.zeros((4, batch, height, width), device=images.device)  # red, green, blue, weights of pixels inside
    for n in range(4):
        weights = (after_x if n % 2 else 1 - after_x) * (after_y if n // 2 else 1 - after_y)
        pixels = packed.gather(1, first + (n // 2 * line + n % 2)).view(batch, height, width)
        for channel in range(4 if any(fill) else 3):
            out[channel].add_((pixels >> 8 * channel & 255).float().mul_(weights))
    if any(fill):
        colour = torch.tensor(fill, device=images.device).view(3, 1, 1, 1)
        out[:3].sub_(colour).mul_(out[3]).add_(colour)
    return to_levels(out[:3].round_()).transpose(0, 1)


def _with_sizes(coordinates: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """Splits coordinates (B, 2, H, W) into columns with the images' width and rows with their height."""
    columns, rows = coordinates.unbind(1)
    return [(columns, coordinates.shape[3]), (rows, coordinates.shape[2])]
