"""The arithmetic of a training, and the number of epochs at which trainings take equally much of it."""

from __future__ import annotations

from sdpnet.config.length import with_epochs
from sdpnet.config.options import Config
from sdpnet.config.resolution import image_size_of, patch_dropout_of
from sdpnet.flags.lab import Equal
from sdpnet.model.flops import forward_macs

__all__ = ["equally_long", "mean_share", "training_macs"]


def training_macs(config: Config, num_classes: int) -> float:
    """Multiply-accumulates of a training for each image of its split: three forward passes in each epoch.

    Smaller images at the beginning and dropped patches are counted as what they are. Evaluation, augmentation, norms
    and the optimizer are not counted.
    """
    options, size = config.model.options(num_classes), config.data.image_size
    return 3.0 * sum(
        forward_macs(options, image_size_of(epoch, config.resolution, size), patch_dropout_of(epoch, config))
        for epoch in range(config.train.epochs)
    )


def mean_share(config: Config, num_classes: int) -> float:
    """The operations of a mean epoch as a share of those of the last one, which has the largest images."""
    options, last = config.model.options(num_classes), config.train.epochs - 1
    size = image_size_of(last, config.resolution, config.data.image_size)
    return training_macs(config, num_classes) / (
        3.0 * config.train.epochs * forward_macs(options, size, patch_dropout_of(last, config))
    )


def equally_long(config: Config, baseline: Config, equal: Equal, share: float, num_classes: int) -> Config:
    """The config of a variant with the epochs that the comparison gives it.

    Args:
        equal: `compute` takes the epochs at which the variant needs as many operations as the baseline, `epochs` takes
            the baseline's epochs, and `own` those of the variant's own config.
        share: the part of that number which is trained, such as 0.5 in an earlier round; at least one epoch remains.
    """
    epochs = float(config.train.epochs if equal == "own" else baseline.train.epochs)
    if equal == "compute":
        same_length = with_epochs(config, baseline.train.epochs)
        epochs *= training_macs(baseline, num_classes) / training_macs(same_length, num_classes)
    return with_epochs(config, max(1, round(share * epochs)))
