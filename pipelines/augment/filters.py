"""Operations that read several values for each one they write: other channels (grey, colour) or neighbouring pixels."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from pipelines.policies import Operation

__all__ = ["FILTERS", "grey_levels", "to_levels"]

_BLUR_RADIUS = 6  # pixels: three standard deviations of the widest blur


def to_levels(values: torch.Tensor) -> torch.Tensor:
    """Floats from 0 to 255, cut off: uint8. By way of int16, a quarter of the time of the direct way on a CPU."""
    return values.to(torch.int16).to(torch.uint8)


def grey_levels(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 1, H, W), not rounded; ITU-R 601's weights, in torchvision's order."""
    red, green, blue = images.unbind(1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).unsqueeze(1)


def greyscale(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    return to_levels(grey_levels(images)).expand_as(images)


def colour(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    factors = (1.0 + magnitudes).view(-1, 1, 1, 1)
    grey = grey_levels(images).floor_()
    own = images.float().mul_(factors.float())
    return to_levels(own.addcmul_(grey, (1.0 - factors).float()).clamp_(0, 255))


def sharpness(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    """Away from, or towards, the mean over 3 x 3 pixels with the middle counted five times; borders stay."""
    height, width = images.shape[2:]
    if height <= 2 or width <= 2:
        return images
    rows = images.flatten(2).to(torch.int16)  # lines end to end: what is summed across their ends is a border pixel
    columns = rows[..., :-2] + rows[..., 1:-1]
    columns.add_(rows[..., 2:])
    total = rows[..., width + 1 : -width - 1] * 4
    for line in range(3):
        total.add_(columns[..., line * width : line * width + total.shape[2]])
    # A whole number / 13 is never a tie.
    difference = total.float().div_(13).round_().sub_(rows[..., width + 1 : -width - 1])
    own = images.float()
    weights = (1.0 - (1.0 + magnitudes)).float().view(-1, 1, 1)
    own.flatten(2)[..., width + 1 : -width - 1].addcmul_(difference, weights)
    out = to_levels(own.clamp_(0, 255))
    out[..., 0], out[..., -1] = images[..., 0], images[..., -1]
    return out


def gaussian_blur(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    """Standard deviations (B,) in pixels; 13 x 13 pixels, separated, reflected at borders (images of 7 or more)."""
    offsets = torch.arange(_BLUR_RADIUS + 1, device=images.device)
    weights = torch.exp(-0.5 * (offsets / magnitudes.view(-1, 1)) ** 2)
    weights = weights / (2 * weights.sum(1, keepdim=True) - weights[:, :1])
    weights = weights.float().view(-1, 1, 1, 1, _BLUR_RADIUS + 1)
    out = images.float()
    for dimension, padding in ((3, (_BLUR_RADIUS, _BLUR_RADIUS, 0, 0)), (2, (0, 0, _BLUR_RADIUS, _BLUR_RADIUS))):
        size = out.shape[dimension]
        padded = pad(out, padding, mode="reflect")
        out = padded.narrow(dimension, _BLUR_RADIUS, size) * weights[..., 0]
        for k in range(1, _BLUR_RADIUS + 1):
            pair = padded.narrow(dimension, _BLUR_RADIUS - k, size) + padded.narrow(dimension, _BLUR_RADIUS + k, size)
            out.addcmul_(pair, weights[..., k])
    return to_levels(out.round_())


FILTERS = {
    Operation.COLOUR: colour,
    Operation.SHARPNESS: sharpness,
    Operation.GREYSCALE: greyscale,
    Operation.GAUSSIAN_BLUR: gaussian_blur,
}
