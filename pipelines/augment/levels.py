"""Operations whose result at a pixel depends on its own level alone, given its channel's or image's statistics.

Float32 where torchvision's functions use it, by the same operations, so that the results are equal to theirs; else
integers. Measured on a CPU, that takes less time than a table of 256 levels and a look-up, which only equalize needs.
"""

from __future__ import annotations

import torch

from pipelines.augment.filters import grey_levels
from pipelines.policies import Operation

__all__ = ["LEVELS"]


def _per_sample(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


def brightness(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    return images.float().mul_(_per_sample(1.0 + magnitudes).float()).clamp_(0, 255).to(torch.uint8)


def contrast(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    means = grey_levels(images).floor_().mean(dim=(1, 2, 3), keepdim=True)
    factors = _per_sample(1.0 + magnitudes)
    own = images.float().mul_(factors.float())
    return own.addcmul_(means, (1.0 - factors).float()).clamp_(0, 255).to(torch.uint8)


def posterize(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    bits = _per_sample(magnitudes).to(torch.int32)
    return images & (256 - (1 << (8 - bits))).to(torch.uint8)


def solarize(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    lowest = _per_sample(magnitudes).ceil()
    changed = (images >= lowest.clamp(max=255).to(torch.uint8)).view(torch.uint8)
    return changed.mul_((lowest <= 255).to(torch.uint8) * 255).bitwise_xor_(images)


def solarize_add(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    return images + _per_sample(magnitudes).to(torch.uint8) * (images < 128)


def invert(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    return images.bitwise_not()


def autocontrast(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    low = images.flatten(2).amin(2)[..., None, None].float()
    high = images.flatten(2).amax(2)[..., None, None].float()
    flat = high == low
    scale = torch.where(flat, 1.0, (high - low) * (1.0 / 255))
    return images.float().sub_(torch.where(flat, 0.0, low)).div_(scale).clamp_(0, 255).to(torch.uint8)


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


LEVELS = {
    Operation.BRIGHTNESS: brightness,
    Operation.CONTRAST: contrast,
    Operation.POSTERIZE: posterize,
    Operation.SOLARIZE: solarize,
    Operation.SOLARIZE_ADD: solarize_add,
    Operation.INVERT: invert,
    Operation.AUTOCONTRAST: autocontrast,
    Operation.EQUALIZE: equalize,
}
