"""The optimizer and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from sdpnet.config import OptimOptions

__all__ = ["learning_rate", "make_optimizer", "peak_learning_rate"]


def make_optimizer(model: nn.Module, options: OptimOptions) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2017); fused where the parameters are on a GPU.

    Weight decay acts on matrices and filters only, not on norms, biases, the class token or the registers.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_token = name.endswith(("class_token", "registers"))
        (plain if parameter.ndim < 2 or is_token else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    on_gpu = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=on_gpu or None)


def peak_learning_rate(options: OptimOptions, global_batch_size: int) -> float:
    """`lr` scaled linearly with the batch: lr x global batch / reference batch."""
    if options.lr_reference_batch == 0:
        return options.lr
    return options.lr * global_batch_size / options.lr_reference_batch


def learning_rate(step: int, options: OptimOptions, *, peak: float, steps_per_epoch: int, epochs: int) -> float:
    """The learning rate of step 0, 1, 2, ...: linear warm-up to `peak`, then cosine annealing with warm restarts.

    Warm-up rises in equal parts and reaches `peak` with its last step. Each cycle falls from `peak` to `min_lr`
    (Loshchilov & Hutter, 2016, eq. 5), as `torch.optim.lr_scheduler.CosineAnnealingWarmRestarts` does step by step.
    """
    warmup = round(options.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return peak * (step + 1) / warmup
    position = step - warmup
    cycle = round(options.restart_epochs * steps_per_epoch) or max(1, epochs * steps_per_epoch - warmup)
    while position >= cycle:
        position -= cycle
        cycle = round(cycle * options.restart_factor)
    return options.min_lr + (peak - options.min_lr) * 0.5 * (1 + math.cos(math.pi * position / cycle))
