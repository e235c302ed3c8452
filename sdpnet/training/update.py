"""The end of a training step: weights and their average move, unless something of the step is not finite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from sdpnet.optim.ema import ModelEma
from sdpnet.optim.nonfinite import Guard, Verdict
from sdpnet.optim.optimizer import step_unless

__all__ = ["update"]


def update(
    step: int,
    loss: torch.Tensor,
    grad_norm: torch.Tensor,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    guard: Guard,
    ema: ModelEma | None,
    late: bool,
    mark: Callable[[str], object] = lambda part: None,
) -> Verdict:
    """Takes an optimizer step or leaves it out, as `guard` says, which must have been told to `keep` before the forward
    pass; `scaler` has unscaled the gradients. The other arguments are `Guard.check`'s.

    With `late` (a fused AdamW) the device decides, nobody waits for it, and the verdict is on the step before. `mark`
    is called with "optimizer" and "EMA" when these have been done.
    """
    if late:
        bad = guard.mark(step, loss, grad_norm)
        step_unless(optimizer, bad)
        scaler.update()
        verdict = guard.told()
        mark("optimizer")
        if ema is not None:
            ema.update(model, bad)
    else:
        verdict = guard.check(step, loss, grad_norm)
        if verdict.action == "step":
            scaler.step(optimizer)
        scaler.update()
        mark("optimizer")
        if verdict.action == "step" and ema is not None:
            ema.update(model)
    mark("EMA")
    return verdict
