"""The exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from sdpnet.config.options import EmaOptions

__all__ = ["ModelEma"]


class ModelEma:
    """A float32 copy of `model`, in eval mode, that follows its parameters and buffers: `module`, ready to evaluate.

    As in timm's ModelEmaV3 all floating-point entries of the state are averaged, batch-norm statistics too, and the
    others copied. With `options.warmup` the decay of update t = 0, 1, 2, ... is min(decay, (1 + t) / (10 + t)).

    Under DDP the processes' batch-norm statistics differ, and so do their averages: before an evaluation
    `sdpnet.distributed.processes.same_weights` must see `module` too.
    """

    def __init__(self, model: nn.Module, options: EmaOptions) -> None:
        self.options = options
        self.module = copy.deepcopy(model).float().eval().requires_grad_(False)
        self._calls = 0
        self._left_out: torch.Tensor | None = None  # of the calls, float64 on the device

    @property
    def num_updates(self) -> int:
        """So far. Waits for the device after updates that may have been left out."""
        return self._calls - (0 if self._left_out is None else int(self._left_out.item()))

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        self._calls, self._left_out = value, None

    @property
    def decay(self) -> float:
        """Of the next update."""
        if not self.options.warmup:
            return self.options.decay
        return min(self.options.decay, (1 + self.num_updates) / (10 + self.num_updates))

    @torch.no_grad()
    def update(self, model: nn.Module, bad: torch.Tensor | None = None) -> None:
        """Moves the average towards `model`'s weights, after an optimizer step.

        `bad` (a scalar on the device, 1 or 0) is 1 for a step that was left out: the average stays, and the update does
        not count. Nobody waits for it; `model` must be finite all the same.
        """
        averages, values = [], []
        current = model.state_dict()
        for name, average in self.module.state_dict().items():
            if average.is_floating_point():
                averages.append(average)
                values.append(current[name].float())
            else:
                average.copy_(current[name])
        if bad is None:
            torch._foreach_lerp_(averages, values, 1 - self.decay)
        else:
            differences = torch._foreach_sub(values, averages)
            torch._foreach_mul_(differences, self._weight(bad))
            torch._foreach_add_(averages, differences)
        self._calls += 1

    def _weight(self, bad: torch.Tensor) -> torch.Tensor:
        """1 - decay, or 0 where `bad` is 1: float32, a scalar; counts the update among those left out then."""
        if self._left_out is None:
            self._left_out = torch.zeros((), dtype=torch.float64, device=bad.device)
        decay = torch.full_like(self._left_out, self.options.decay)
        if self.options.warmup:
            updates = self._calls - self._left_out
            decay = torch.minimum(decay, (1 + updates) / (10 + updates))
        self._left_out += bad
        return ((1 - decay) * (1 - bad)).float()
