"""Progressive resolution: small images first, which cost less, and the full size towards the end."""

from __future__ import annotations

from sdpnet.config.options import ResolutionOptions

__all__ = ["image_size_of"]


def image_size_of(epoch: int, options: ResolutionOptions, full_size: int) -> int:
    """The image size of a training epoch (0, 1, ...), in pixels a side.

    Linear between the two ends of the ramp and rounded to a multiple of `options.multiple` (Touvron et al., 2019, for
    the idea; the ramp is that of FFCV's ImageNet recipe). From `end_epoch` on it is `full_size`.
    """
    if options.start_size == 0 or epoch >= options.end_epoch:
        return full_size
    way = max(0.0, (epoch - options.begin_epoch) / (options.end_epoch - options.begin_epoch))
    size = options.start_size + way * (full_size - options.start_size)
    return min(full_size, round(size / options.multiple) * options.multiple)
