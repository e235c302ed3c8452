"""What an epoch of training costs less than the last one: smaller images, and patches that the encoder does not get."""

from __future__ import annotations

from sdpnet.config.options import Config, ResolutionOptions

__all__ = ["image_size_of", "patch_dropout_of"]


def image_size_of(epoch: int, options: ResolutionOptions, full_size: int) -> int:
    """The image size of a training epoch (0, 1, ...), in pixels a side.

    The size rises linearly from `begin_epoch` to `end_epoch`, rounded to a multiple of `options.multiple`. From
    `end_epoch` on it is the final size: `options.end_size` or, if that is 0, `full_size`, the size of evaluation. The
    idea is from Touvron et al., 2019, the ramp from FFCV's ImageNet recipe.
    """
    full_size = options.end_size or full_size
    if options.start_size == 0 or epoch >= options.end_epoch:
        return full_size
    progress = max(0.0, (epoch - options.begin_epoch) / (options.end_epoch - options.begin_epoch))
    size = options.start_size + progress * (full_size - options.start_size)
    return min(full_size, round(size / options.multiple) * options.multiple)


def patch_dropout_of(epoch: int, config: Config) -> float:
    """The rate of patch dropout in a training epoch (0, 1, ...): 0 in the last `train.full_patch_epochs` epochs."""
    rate = config.model.options(num_classes=1).patch_dropout
    return rate if epoch < config.train.epochs - config.train.full_patch_epochs else 0.0
