"""Operations whose result at a pixel depends on its own level alone, given its channel's or image's statistics.

Float32 where torchvision's functions use it, else integers, and the same results on every CPU and GPU (see `filters`).
On a CPU a table of 256 levels and torch's look-up take twice the time of brightness by arithmetic, and 3 to 19 times
that of what needs integers alone (records/LOG.md); only equalize needs one.
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
    means = totals / torch.full_like(totals, grey.shape[1])  # a GPU would multiply by a number's reciprocal
    factors = _per_sample(1.0 + magnitudes)
    return to_levels(images.float().mul_(factors.float()).add_(means * (1.0 - factors).float()).clamp_(0, 255))


def posterize(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    bits = _per_sample(magnitudes).to(torch.int32)
    return images & (256 - (1 << (8 - bits))).to(torch.uint8)


def solarize(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    below = _per_sample(magnitudes).ceil().to(torch.int16) - 1
    changed = (below - images) >> 15  # -1, all bits, where a level is higher, else 0
    return changed.to(torch.uint8).bitwise_xor_(images)


def solarize_add(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    dark = (images.to(torch.int16) - 128) >> 15  # -1, all bits, or 0
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
    """uint8 (B, C, N) -> int32 (B, C, 256)."""
    if flat.device.type == "cpu":  # one by one, which takes a fifth of scatter_add_'s time there
        channels = [torch.bincount(channel, minlength=256) for channel in flat.flatten(0, 1)]
        return torch.stack(channels).int().view(*flat.shape[:2], 256)
    index = flat.long()
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int32, device=flat.device)
    return counts.scatter_add_(2, index, counts.new_ones(1).expand(index.shape))


def equalize(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    """Pillow's `ImageOps.equalize` in integers; a channel with under 255 pixels below its highest level stays."""
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
