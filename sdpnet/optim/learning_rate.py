"""The learning rate as a function of the step: warm-up, then a constant, a cosine, or a cosine with warm restarts."""

from __future__ import annotations

import math

import torch

from sdpnet.config.options import OptimOptions

__all__ = ["learning_rate", "peak_learning_rate", "set_learning_rate"]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group of `make_optimizer` to `lr` times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def peak_learning_rate(options: OptimOptions, global_batch_size: int) -> float:
    """The peak learning rate, scaled linearly with the batch: lr x global batch / reference batch."""
    if options.lr_reference_batch == 0:
        return options.lr
    return options.lr * global_batch_size / options.lr_reference_batch


def learning_rate(step: int, options: OptimOptions, *, peak: float, steps_per_epoch: int, epochs: int) -> float:
    """The learning rate of step 0, 1, 2, ...: a linear warm-up to `peak`, then the schedule of `options.schedule`.

    The warm-up rises in equal parts and reaches `peak` with its last step. Each cosine cycle falls from `peak` to
    `min_lr` (Loshchilov & Hutter, 2016, eq. 5), with the same values as a scheduler
    `torch.optim.lr_scheduler.CosineAnnealingWarmRestarts` that is called once per step.
    """
    warmup = round(options.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return peak * (step + 1) / warmup
    if options.schedule == "constant":
        return peak
    position = step - warmup
    cycle = max(1, epochs * steps_per_epoch - warmup)
    if options.schedule == "restarts" and options.restart_epochs > 0:
        cycle = round(options.restart_epochs * steps_per_epoch) or cycle
    while position >= cycle:
        position -= cycle
        cycle = round(cycle * options.restart_factor)
    return options.min_lr + (peak - options.min_lr) * 0.5 * (1 + math.cos(math.pi * position / cycle))
