"""The exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from sdpnet.options import EmaOptions

__all__ = ["ModelEma"]


class ModelEma:
    """A float32 copy of `model`, in eval mode, that follows its parameters and buffers: `module`, ready to evaluate.

    As in timm's ModelEmaV3 all floating-point entries of the state are averaged, batch-norm statistics too, and the
    others copied. With `options.warmup` the decay of update t = 0, 1, 2, ... is min(decay, (1 + t) / (10 + t)).

    Under DDP the processes' batch-norm statistics differ, and so do their averages: before an evaluation
    `sdpnet.distributed.same_weights` must see `module` too.
    """

    def __init__(self, model: nn.Module, options: EmaOptions) -> None:
        self.options = options
        self.module = copy.deepcopy(model).float().eval().requires_grad_(False)
        self.num_updates = 0

    @property
    def decay(self) -> float:
        """Of the next update."""
        if not self.options.warmup:
            return self.options.decay
        return min(self.options.decay, (1 + self.num_updates) / (10 + self.num_updates))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards `model`'s weights, after an optimizer step that was taken."""
        averages, values = [], []
        current = model.state_dict()
        for name, average in self.module.state_dict().items():
            if average.is_floating_point():
                averages.append(average)
                values.append(current[name].float())
            else:
                average.copy_(current[name])
        torch._foreach_lerp_(averages, values, 1 - self.decay)
        self.num_updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates, "weights": self.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_updates = state["num_updates"]
        self.module.load_state_dict(state["weights"])
