"""Batch normalisation over the batches of all processes, so that several processes train like one.

torch's `SyncBatchNorm` works on GPUs only. The class here does the same on CPUs, for tests and small runs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["synchronize_batch_norm"]


class _Sum(torch.autograd.Function):
    """The sum over all processes.

    Every process adds its own loss to the total, and each loss depends on this sum. The gradient is therefore the sum
    of the gradients of all processes, too.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class _CpuSyncBatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` on (B, C, H, W) that normalises by the mean and variance of all processes' samples in training.

    The forward pass sums the values and then the squared distances from the mean over the processes. The backward pass
    sums the gradients of both sums over the processes, as torch's `SyncBatchNorm` does.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        dtype, x = x.dtype, x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        # The mean is summed before the squared distances from it. One pass with E[x^2] - E[x]^2 would lose the digits
        # of a variance that is small beside the mean.
        count = x.new_tensor([x.numel() / x.shape[1]])
        dist.all_reduce(count)
        mean = _Sum.apply(x.sum(dim=(0, 2, 3))) / count
        centred = x - mean.view(1, -1, 1, 1)
        variance = _Sum.apply(centred.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(dtype)


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Replaces the batch norms of `model` by ones that see the samples of all processes; weights and names stay.

    On GPUs the replacement is `torch.nn.SyncBatchNorm`. Every process must call it, after it has joined the group.

    Returns:
        `model` itself.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, module in model.named_modules():
        if type(module) is nn.BatchNorm2d:
            ours = _CpuSyncBatchNorm(module.num_features, module.eps, module.momentum)
            ours.load_state_dict(module.state_dict())
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, ours.to(next(module.parameters()).dtype))
    return model
