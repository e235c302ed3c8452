"""Operations whose result at a pixel depends on its level alone: one table of 256 levels a channel, then one look-up.

A table's entries come from the same float32 operations as torchvision's for whole images, so they are equal to its; the
rest is integers. Measured on a CPU, the look-up costs less than the arithmetic on all pixels.
"""

from __future__ import annotations

import torch

from pipelines.augment.filters import grey_levels
from pipelines.policies import Operation

__all__ = ["TABLES", "look_up"]


def look_up(images: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Images uint8 (B, 3, H, W) through tables uint8 (B, 1 or 3, 256)."""
    index = images.flatten(2).long()
    return tables.expand(-1, 3, -1).gather(2, index).view_as(images)


def _levels(images: torch.Tensor) -> torch.Tensor:
    return torch.arange(256, device=images.device, dtype=torch.float32)


def brightness(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    factors = (1.0 + magnitudes).float().view(-1, 1, 1)
    return look_up(images, (_levels(images) * factors).clamp_(0, 255).to(torch.uint8))


def contrast(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    means = grey_levels(images).floor_().mean(dim=(1, 2, 3)).view(-1, 1, 1)
    factors = (1.0 + magnitudes).view(-1, 1, 1)
    blended = torch.addcmul(_levels(images) * factors.float(), means, (1.0 - factors).float())
    return look_up(images, blended.clamp_(0, 255).to(torch.uint8))


def posterize(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    bits = magnitudes.to(torch.int32).view(-1, 1, 1, 1)
    return images & (256 - (1 << (8 - bits))).to(torch.uint8)


def solarize(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    levels = _levels(images)
    return look_up(images, torch.where(levels >= magnitudes.view(-1, 1, 1), 255 - levels, levels).to(torch.uint8))


def solarize_add(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    added = magnitudes.to(torch.uint8).view(-1, 1, 1, 1)
    return images + added * (images < 128)


def invert(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    return images.bitwise_not()


def autocontrast(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    low = images.flatten(2).amin(2, keepdim=True).float()
    high = images.flatten(2).amax(2, keepdim=True).float()
    flat = high == low
    scale = torch.where(flat, 1.0, (high - low) * (1.0 / 255))
    low = torch.where(flat, 0.0, low)
    return look_up(images, ((_levels(images) - low) / scale).clamp_(0, 255).to(torch.uint8))


def equalize(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    """Pillow's `ImageOps.equalize` in integers; a channel with under 255 pixels below its highest level stays."""
    flat = images.flatten(2)
    index, channels = flat.long(), flat.shape[:2]
    counts = torch.zeros(*channels, 256, dtype=torch.int32, device=images.device)
    counts.scatter_add_(2, index, counts.new_ones(1).expand(index.shape))
    highest = flat.amax(2, keepdim=True).long()
    step = (flat.shape[2] - counts.gather(2, highest)).div_(255, rounding_mode="floor")
    below = counts.cumsum(2, dtype=torch.int32) - counts
    table = below.add_(step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(0, 255)
    table = torch.where(step > 0, table, torch.arange(256, dtype=torch.int32, device=images.device))
    return table.to(torch.uint8).gather(2, index).view_as(images)


TABLES = {
    Operation.BRIGHTNESS: brightness,
    Operation.CONTRAST: contrast,
    Operation.POSTERIZE: posterize,
    Operation.SOLARIZE: solarize,
    Operation.SOLARIZE_ADD: solarize_add,
    Operation.INVERT: invert,
    Operation.AUTOCONTRAST: autocontrast,
    Operation.EQUALIZE: equalize,
}
