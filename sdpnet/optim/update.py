"""The update at the end of a step: the norm of the gradients, clipping, the optimizer, and the average of the weights.

update = TorchUpdate(model, optimizer, ema, clip_grad_norm)
grad_norm = update.grad_norm()
update.step(bad)
update.average(bad)
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from sdpnet.optim.ema import ModelEma
from sdpnet.optim.optimizer import step_unless

__all__ = ["TorchUpdate", "Update"]


class Update(Protocol):
    """The update at the end of a step, in three calls. The host waits for the device in none of them.

    All of them change the optimizer and the average that they were made with, so checkpoints do not depend on which
    update is used.
    """

    def grad_norm(self) -> torch.Tensor:
        """Returns the norm of all gradients before clipping, a float32 scalar on the device."""
        ...

    def step(self, bad: torch.Tensor) -> None:
        """Clips the gradients where the recipe does, and takes the optimizer's step.

        Args:
            bad: 1 for a step that must change nothing, else 0: a float32 scalar on the device.
        """
        ...

    def average(self, bad: torch.Tensor) -> None:
        """Moves the average towards the new weights unless the step was bad."""
        ...


class TorchUpdate:
    """The update by PyTorch's functions.

    Args:
        ema: the average of `model`, or None.
        clip_grad_norm: the largest norm that the gradients keep; 0 does not clip.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, ema: ModelEma | None, clip_grad_norm: float
    ) -> None:
        self.model, self.optimizer, self.ema, self.clip_grad_norm = model, optimizer, ema, clip_grad_norm

    def grad_norm(self) -> torch.Tensor:
        if self.clip_grad_norm > 0:
            return torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad_norm)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def step(self, bad: torch.Tensor) -> None:
        step_unless(self.optimizer, bad)

    def average(self, bad: torch.Tensor) -> None:
        if self.ema is not None:
            self.ema.update(self.model, bad)
