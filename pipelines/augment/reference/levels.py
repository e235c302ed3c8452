"""Operations whose result at a pixel depends only on its own level and on statistics of its channel or image.

They use float32 where torchvision's functions do, and integers otherwise; results are the same on every CPU and GPU
(see `filters`). Only equalize looks levels up in a table: on a CPU, a look-up takes twice the time of brightness by
arithmetic, and 3 to 19 times that of the operations on integers (records/LOG.md).
"""

from __future__ import annotations

import torch

from sdpnet.pipelines.augment.reference.filters import grey_levels, to_levels
from sdpnet.pipelines.planning.policies import Operation

__all__ = ["LEVELS"]


def _per_sample(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


def brightness(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    return to_levels(images.float().mul_(_per_sample(1.0 + magnitudes).float()).clamp_(0, 255))


def contrast(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    grey = grey_levels(images).flatten(1)
    totals = _per_sample(grey.sum(1)).float()
    # Divided by a tensor, because a GPU would multiply by the reciprocal of a plain number instead.
    means = totals / torch.full_like(totals, grey.shape[1])
    factors = _per_sample(1.0 + magnitudes)
    return to_levels(images.float().mul_(factors.float()).add_(means * (1.0 - factors).float()).clamp_(0, 255))


def posterize(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    bits = _per_sample(magnitudes).to(torch.int32)
    return images & (256 - (1 << (8 - bits))).to(torch.uint8)


def solarize(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    below = _per_sample(magnitudes).ceil().to(torch.int16) - 1
    changed = (below - images) >> 15  # -1, all bits set, where a level is higher, else 0
    return changed.to(torch.uint8).bitwise_xor_(images)


def solarize_add(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    dark = (images.to(torch.int16) - 128) >> 15  # -1, all bits set, where a level is dark, else 0
    return dark.bitwise_and_(_per_sample(magnitudes).to(torch.int16)).to(torch.uint8).add_(images)


def invert(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    return images.bitwise_not()


def autocontrast(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    low = images.flatten(2).amin(2)[..., None, None].float()
    high = images.flatten(2).amax(2)[..., None, None].float()
    flat = high == low
    scale = torch.where(flat, 1.0, (high - low) * (1.0 / 255))
    return to_levels(images.float().sub_(torch.where(flat, 0.0, low)).div_(scale).clamp_(0, 255))


def _histograms(flat: torch.Tensor) -> torch.Tensor:
    """Counts levels: int32 (B, C, 256) from uint8 (B, C, N)."""
    if flat.device.type == "cpu":  # channel by channel, which takes a fifth of scatter_add_'s time on a CPU
        channels = [torch.bincount(channel, minlength=256) for channel in flat.flatten(0, 1)]
        return torch.stack(channels).int().view(*flat.shape[:2], 256)
    index = flat.long()
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int32, device=flat.device)
    return counts.scatter_add_(2, index, counts.new_ones(1).expand(index.shape))


def equalize(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    """Equalizes histograms as Pillow's `ImageOps.equalize` does, in integers.

    A channel with fewer than 255 pixels below its highest level does not change.
    """
    flat = images.flatten(2)
    index, counts = flat.long(), _histograms(flat)
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
