"""The exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from sdpnet.config.options import EmaOptions

__all__ = ["ModelEma"]


class ModelEma:
    """An exponential moving average of the parameters and buffers of `model`.

    As in timm's ModelEmaV3, all floating-point entries of the state are averaged, including batch-norm statistics, and
    the others are copied. With `options.warmup` the decay of update t = 0, 1, 2, ... is min(decay, (1 + t) / (10 + t)).

    Under DDP, each process has batch-norm statistics of its own and therefore averages of its own. Before an evaluation
    `sdpnet.distributed.processes.same_weights` must be called for `module`, as for the model.

    Attributes:
        module: the average: a float32 copy of the model in eval mode.
    """

    def __init__(self, model: nn.Module, options: EmaOptions) -> None:
        self.options = options
        self.module = copy.deepcopy(model).float().eval().requires_grad_(False)
        self._calls = 0
        # The number of calls for skipped steps, a float64 scalar on the device. Whether a step was skipped is known on
        # the device only; a count on the host would have to wait for it.
        self._skipped: torch.Tensor | None = None

    @property
    def num_updates(self) -> int:
        """The number of updates so far, not counting skipped steps. Waits for the device."""
        return self._calls - (0 if self._skipped is None else int(self._skipped.item()))

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        self._calls, self._skipped = value, None

    @property
    def decay(self) -> float:
        """The decay of the next update."""
        if not self.options.warmup:
            return self.options.decay
        return min(self.options.decay, (1 + self.num_updates) / (10 + self.num_updates))

    @torch.no_grad()
    def update(self, model: nn.Module, bad: torch.Tensor | None = None) -> None:
        """Moves the average towards `model`'s weights, after an optimizer step.

        Args:
            model: its weights must be finite.
            bad: 1 for a step that was skipped, else 0 (a scalar on the device). After a skipped step the average stays
                as it is and the update does not count. The host does not wait for the value.
        """
        averages, values = [], []
        current = model.state_dict()
        for name, average in self.module.state_dict().items():
            if average.is_floating_point():
                averages.append(average)
                values.append(current[name].float())
            else:
                average.copy_(current[name])
        _move(averages, values, self.count(averages[0].device, bad))

    def count(self, device: torch.device, bad: torch.Tensor | None) -> torch.Tensor:
        """Counts an update. Returns the weight of the new values, a float32 scalar: 1 - decay, or 0 for a skipped step.

        For those who average the values themselves (`sdpnet.optim.fused_update`).
        """
        if self._skipped is None:
            self._skipped = torch.zeros((), dtype=torch.float64, device=device)
        skip = torch.zeros_like(self._skipped) if bad is None else bad.double()
        decay = torch.full_like(skip, self.options.decay)
        if self.options.warmup:
            updates = self._calls - self._skipped
            decay = torch.minimum(decay, (1 + updates) / (10 + updates))
        self._skipped += skip
        self._calls += 1
        return ((1 - decay) * (1 - skip)).float()


def _move(averages: list[torch.Tensor], values: list[torch.Tensor], weight: torch.Tensor) -> None:
    """Adds `weight` times the differences of `values` and `averages` to `averages`; all are float32.

    On a GPU one kernel reads and writes each average once, instead of the three passes over the weights that the sum
    takes elsewhere. `torch._foreach_lerp_` does not take a weight that is on the device. The fused SGD does: with the
    negated values as gradients and a weight decay of 1, its step is average -= weight * (average - value).
    """
    alike = all(average.stride() == value.stride() for average, value in zip(averages, values, strict=True))
    if averages[0].is_cuda and alike:
        torch._fused_sgd_(
            averages,
            values,
            [],
            lr=weight,
            weight_decay=1.0,
            maximize=True,
            momentum=0.0,
            dampening=0.0,
            nesterov=False,
            is_first_step=False,
        )
        return
    differences = torch._foreach_sub(values, averages)
    torch._foreach_mul_(differences, weight)
    torch._foreach_add_(averages, differences)
