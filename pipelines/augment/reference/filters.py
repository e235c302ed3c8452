"""Operations that read several values for each one they write: other channels (grey, colour) or neighbouring pixels.

The results are the same on every CPU and GPU. The arithmetic uses integers, or float32 where each product and each sum
is a separate operation. Operations that multiply and add at once (`addcmul`, `add` with `alpha`) round once or twice,
depending on the processor and on how torch was compiled, so they are not used on floats here.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from sdpnet.pipelines.planning.policies import Operation

__all__ = ["FILTERS", "GREY_ADDEND", "GREY_SHIFT", "GREY_WEIGHTS", "IN_CACHE", "grey_levels", "to_levels"]

# Blur and bilinear resampling make tens of passes over floats, which have to stay in a CPU's second-level cache: two
# images at once were 3 times as fast as sixteen (records/LOG.md).
IN_CACHE = 2  # images
_BLUR_RADIUS = 6  # pixels: three standard deviations of the widest blur

# Grey levels are truncated, so a sum that is off by the last bit would change a level. The weights are those of
# torchvision (0.2989, 0.587, 0.114; ITU-R 601), times 2^23. The exact sum is a multiple of 1/10000, and the integer sum
# is less than 80 / 2^23 below it and less than 45 / 2^23 above it. With an addend of 400, the bits from 23 on are the
# whole part of the exact sum for all 2^24 colours, and no sum exceeds int32.
GREY_WEIGHTS, GREY_ADDEND, GREY_SHIFT = (2507355, 4924113, 956301), 400, 23


def to_levels(values: torch.Tensor) -> torch.Tensor:
    """Truncates floats from 0 to 255 to uint8, through int16: a quarter of the direct conversion's time on a CPU."""
    return values.to(torch.int16).to(torch.uint8)


def grey_levels(images: torch.Tensor) -> torch.Tensor:
    """Grey levels, int32 (B, 1, H, W), of images, uint8 (B, 3, H, W).

    They are exactly the whole part of 0.2989 red + 0.587 green + 0.114 blue.
    """
    red, green, blue = (
        plane.mul_(weight) for plane, weight in zip(images.to(torch.int32).unbind(1), GREY_WEIGHTS, strict=True)
    )
    return red.add_(green).add_(blue).add_(GREY_ADDEND).bitwise_right_shift_(GREY_SHIFT).unsqueeze(1)


def greyscale(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    return grey_levels(images).to(torch.uint8).expand_as(images)


def colour(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    factors = (1.0 + magnitudes).view(-1, 1, 1, 1)
    grey = grey_levels(images).float().mul_((1.0 - factors).float())
    return to_levels(images.float().mul_(factors.float()).add_(grey).clamp_(0, 255))


def sharpness(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    """Moves each level away from or towards the mean of its 3 x 3 pixels, in which the middle one counts five times.

    Border pixels do not change.
    """
    height, width = images.shape[2:]
    if height <= 2 or width <= 2:
        return images
    rows = images.flatten(2).to(torch.int16)  # lines end to end: sums across a line's end fall on border pixels
    columns = rows[..., :-2] + rows[..., 1:-1]
    columns.add_(rows[..., 2:])
    total = rows[..., width + 1 : -width - 1] * 4
    for line in range(3):
        total.add_(columns[..., line * width : line * width + total.shape[2]])
    # A whole number / 13 is never a tie, so the last bit of the quotient does not matter.
    difference = total.float().div_(13).round_().sub_(rows[..., width + 1 : -width - 1])
    own = images.float()
    weights = (1.0 - (1.0 + magnitudes)).float().view(-1, 1, 1)
    own.flatten(2)[..., width + 1 : -width - 1].add_(difference.mul_(weights))
    out = to_levels(own.clamp_(0, 255))
    out[..., 0], out[..., -1] = images[..., 0], images[..., -1]
    return out


def gaussian_blur(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    """Blurs with separable Gaussian filters of 13 x 13 pixels. Images must have at least 7 pixels a side.

    The magnitudes (B,) are standard deviations in pixels. Pixels beyond the borders are reflected.
    """
    if images.device.type == "cpu" and len(images) > IN_CACHE:
        parts = zip(images.split(IN_CACHE), magnitudes.split(IN_CACHE), strict=True)
        return torch.cat([gaussian_blur(*part) for part in parts])
    offsets = torch.arange(_BLUR_RADIUS + 1, device=images.device)
    weights = torch.exp(-0.5 * (offsets / magnitudes.view(-1, 1)) ** 2)
    weights = weights / (2 * weights.sum(1, keepdim=True) - weights[:, :1])
    weights = weights.float().view(-1, 1, 1, 1, _BLUR_RADIUS + 1)
    out = images.float()
    pair = torch.empty_like(out)
    for dimension, padding in ((3, (_BLUR_RADIUS, _BLUR_RADIUS, 0, 0)), (2, (0, 0, _BLUR_RADIUS, _BLUR_RADIUS))):
        size = out.shape[dimension]
        padded = pad(out, padding, mode="reflect")
        torch.mul(padded.narrow(dimension, _BLUR_RADIUS, size), weights[..., 0], out=out)
        for k in range(1, _BLUR_RADIUS + 1):
            before, after = (padded.narrow(dimension, _BLUR_RADIUS + step, size) for step in (-k, k))
            out.add_(torch.add(before, after, out=pair).mul_(weights[..., k]))
    return to_levels(out.round_())


FILTERS = {
    Operation.COLOUR: colour,
    Operation.SHARPNESS: sharpness,
    Operation.GREYSCALE: greyscale,
    Operation.GAUSSIAN_BLUR: gaussian_blur,
}
