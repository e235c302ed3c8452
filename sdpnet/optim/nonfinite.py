"""Steps of which something is not finite: noticed before they change anything, and what follows from them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from sdpnet.config.options import TrainOptions
from sdpnet.distributed.processes import Arriving, Processes, sum_on_device, sum_over_processes
from sdpnet.pipelines.errors import UserError

__all__ = ["Guard", "NonFinite", "Verdict"]

_WINDOW = 1000  # steps within which bad ones count together
_MIN_SCALE = 1.0  # at this loss scale, gradients overflow fp16 by themselves


class NonFinite(UserError):
    """Training ends: a step was not finite, once or too often."""


@dataclass(frozen=True)
class Verdict:
    """What to do about a step, and a line for the user, or "".

    step: take it.
    skip: leave it out; the model is as before the forward pass.
    rollback: leave it out and load the newest checkpoint's model, EMA, optimizer and scaler, not the guard's count, but
        go on with the next batch, as PaLM's training did (Chowdhery et al., 2022): the same batches would give the
        same values again. Where there is no checkpoint yet, the same as skip.
    """

    action: Literal["step", "skip", "rollback"]
    message: str = ""


class Guard:
    """Judges every optimizer step between its backward pass and the optimizer.

        guard.keep()
        forward, backward, scaler.unscale_, total norm of the gradients
        verdict = guard.check(step, loss, grad_norm)
        if verdict.action == "step": scaler.step, EMA
        scaler.update()  # after any verdict; a rollback's loading comes after it

    The forward pass has already moved the batch-norm statistics: `keep` copies the model's buffers, and `check` puts
    them back when the step is not taken. Parameters, optimizer and EMA have not been touched at that point.

    `check` waits for the device. Where that costs time, on GPUs, the device itself leaves a bad step out, and the host
    reads what became of it after the next step's backward pass (`sdpnet.training.update` does either):

        guard.keep()
        forward, backward, scaler.unscale_, total norm of the gradients
        bad = guard.mark(step, loss, grad_norm)
        sdpnet.optim.optimizer.step_unless(optimizer, bad); scaler.update(); EMA with bad
        verdict = guard.told()  # on the step before; before anything is saved or scored: guard.told(all_steps=True)

    So a run that stops has taken one good step more, and a rollback undoes one.

    With a gradient scaler (fp16) an infinite gradient is how it finds its scale: such a step is skipped without
    counting, unless something else is not finite or the scale is down to 1.

    Args:
        options: `on_nonfinite`: stop, skip or rollback; `max_nonfinite`: so many bad steps within 1,000 are borne.
        model: the one whose buffers are kept, not its DDP wrapper, on its device already.
        scaler: may be disabled.
    """

    def __init__(
        self, options: TrainOptions, model: nn.Module, scaler: torch.amp.GradScaler, processes: Processes
    ) -> None:
        self.options = options
        self.scaler = scaler
        self.processes = processes
        self._bad_steps: list[int] = []  # of the last _WINDOW
        self._buffers: dict[torch.dtype, list[torch.Tensor]] = {}  # by dtype: copied by one kernel each
        persistent = model.state_dict().keys()
        for buffer in (buffer for name, buffer in model.named_buffers() if name in persistent):
            self._buffers.setdefault(buffer.dtype, []).append(buffer)
        self._kept = {dtype: [torch.empty_like(b) for b in buffers] for dtype, buffers in self._buffers.items()}
        self._is_kept = False  # whether a step is under way whose buffers can be put back
        self._marked: deque[tuple[int, Arriving]] = deque()  # steps that are not yet told, and what was bad, the scale

    @torch.no_grad()
    def keep(self) -> None:
        for dtype, buffers in self._buffers.items():
            torch._foreach_copy_(self._kept[dtype], buffers)
        self._is_kept = True

    @torch.no_grad()
    def undo(self) -> None:
        """Puts the buffers back as they were before the step that is under way, if one is: it is given up."""
        if self._is_kept:
            for dtype, buffers in self._buffers.items():
                torch._foreach_copy_(buffers, self._kept[dtype])
        self._is_kept = False

    @torch.no_grad()
    def check(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> Verdict:
        """All processes get the same answer; waits for the device once.

        Args:
            step: of the run, for messages and the limit.
            loss: scalar, this process's.
            grad_norm: scalar, of the unscaled gradients, before clipping.

        Raises:
            NonFinite: `on_nonfinite` is stop, or more than `max_nonfinite` steps were bad. The model is as before the
                forward pass then, too.
        """
        self._is_kept = False
        bad = sum_over_processes(self._not_finite(loss, grad_norm), self.processes).tolist()
        if not any(bad):
            return Verdict("step")
        for dtype, buffers in self._buffers.items():
            torch._foreach_copy_(buffers, self._kept[dtype])
        return self._judge(step, bad, self.scaler.get_scale())

    @torch.no_grad()
    def mark(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """1.0 where the step must be left out, else 0.0, the same for all processes: float32, a scalar on the device.

        The buffers are as before the forward pass then. The arguments are `check`'s; nobody waits for the device.
        """
        self._is_kept = False
        counts = sum_on_device(self._not_finite(loss, grad_norm), self.processes)
        scale = self.scaler.scale(torch.ones((1,), device=loss.device)).double()  # get_scale() would wait for it
        self._marked.append((step, Arriving(torch.cat([counts, scale]))))
        bad = counts.any()
        for dtype, buffers in self._buffers.items():  # not by arithmetic: a NaN times 0 is a NaN
            for buffer, kept in zip(buffers, self._kept[dtype], strict=True):
                torch.where(bad, kept, buffer, out=buffer)
        return bad.float()

    def told(self, *, all_steps: bool = False) -> Verdict:
        """What became of the marked step before the newest, or with `all_steps` of the newest: there is one at most.

        All processes must ask after the same steps and get the same answer. Waits for the marks it reads.

        Raises:
            NonFinite: as `check`.
        """
        answer = Verdict("step")
        while len(self._marked) > (0 if all_steps else 1):
            step, arriving = self._marked.popleft()
            *bad, scale = arriving.read()
            if any(bad):
                answer = self._judge(step, bad, scale)
            if answer.action == "rollback":
                self._marked.clear()  # the loading undoes those steps
        return answer

    def _not_finite(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """1 or 0 for loss, gradients, batch-norm statistics: float64 (3,), of this process, on the device."""
        # An activation above 1e19 squares to an infinite variance, of which the loss shows nothing: x / inf is 0.
        statistics = self._buffers.get(torch.float32, [loss.new_zeros(())])
        largest = torch.nn.utils.get_total_norm(statistics, norm_type=float("inf"))
        values = torch.stack([value.to(loss.device, torch.float32) for value in (loss.detach(), grad_norm, largest)])
        return (~torch.isfinite(values)).double()

    def _judge(self, step: int, bad: Sequence[float], scale: float) -> Verdict:
        """What follows from a step of which something was bad, in so many processes."""
        if not bad[0] and not bad[2] and self.scaler.is_enabled() and scale > _MIN_SCALE:
            return Verdict("skip")
        return self._decide(step, bad)

    def _decide(self, step: int, bad: Sequence[float]) -> Verdict:
        names = ("loss", "gradient", "batch-norm statistics")
        what = " and ".join(name for name, count in zip(names, bad, strict=True) if count)
        what = f"step {step}: {what} not finite"
        remedy = "lower optim.lr, or set optim.clip_grad_norm=1 or a longer optim.warmup_epochs"
        if self.options.on_nonfinite == "stop":
            raise NonFinite(f"{what}; {remedy}, or leave such steps out with train.on_nonfinite=skip")
        self._bad_steps = [earlier for earlier in self._bad_steps if earlier > step - _WINDOW] + [step]
        count, limit = len(self._bad_steps), self.options.max_nonfinite
        if count > limit:
            raise NonFinite(f"{what}, {count} of the last {_WINDOW} steps (train.max_nonfinite = {limit}); {remedy}")
        return Verdict(self.options.on_nonfinite, f"{what}: {self.options.on_nonfinite} ({count} of at most {limit})")

    def state_dict(self) -> dict[str, Any]:
        return {"bad_steps": list(self._bad_steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._bad_steps = list(state["bad_steps"])
