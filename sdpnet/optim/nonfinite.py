"""The handling of steps whose loss, gradients or statistics are not finite: they are skipped, and then judged."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from sdpnet.config.options import TrainOptions
from sdpnet.distributed.processes import AsyncRead, Processes, sum_on_device
from sdpnet.pipelines.errors import UserError

__all__ = ["Guard", "NonFinite", "Verdict"]

_WINDOW = 1000  # the number of steps within which bad ones are counted
_MIN_SCALE = 1.0  # at this loss scale, an overflow in fp16 is not caused by the scale


class NonFinite(UserError):
    """Training ends because a step was not finite, once or too often."""


@dataclass(frozen=True)
class Verdict:
    """The judgement of a step, and a line for the user, or "".

    step: it was taken.
    skip: it was skipped; the model is as before its forward pass.
    rollback: it was skipped, and the newest checkpoint's model, average, optimizer and scaler are to be loaded, but not
        the guard's count. Training goes on with the next batch, as PaLM's training did (Chowdhery et al., 2022): the
        same batches would give the same values again. Where there is no checkpoint yet, this is the same as skip.
    """

    action: Literal["step", "skip", "rollback"]
    message: str = ""


class Guard:
    """Skips every optimizer step of which something is not finite, on the device itself:

        guard.keep()
        forward, backward, scaler.unscale_, total norm of the gradients
        bad = guard.find_bad(step, loss, grad_norm)
        sdpnet.optim.optimizer.step_unless(optimizer, bad); scaler.update(); ema.update(model, bad)
        verdict = guard.verdict()

    The forward pass has already moved the batch-norm statistics: `keep` copies the model's buffers, and `find_bad` puts
    them back where the step is bad. Parameters, optimizer and average have not been touched at that point.

    With `asynchronous` (on GPUs) `verdict` is on the step before the newest one, whose values have reached the host in
    the meantime: the host never waits for the device. So a run that stops has taken one good step more, and a rollback
    undoes one. Before anything is saved or scored, `verdict(all_steps=True)` reads the newest step too. Without
    `asynchronous` (on CPUs) `verdict` is on the newest step.

    With a gradient scaler (fp16) an infinite gradient is how it finds its scale: such a step is skipped without
    counting, unless something else is not finite or the scale is down to 1.

    Args:
        options: `on_nonfinite`: stop, skip or rollback; `max_nonfinite`: the number of bad steps within 1,000 that is
            tolerated.
        model: the one whose buffers are kept, not its DDP wrapper, on its device already.
        scaler: may be disabled.
    """

    def __init__(
        self,
        options: TrainOptions,
        model: nn.Module,
        scaler: torch.amp.GradScaler,
        processes: Processes,
        *,
        asynchronous: bool = False,
    ) -> None:
        self.options = options
        self.scaler = scaler
        self.processes = processes
        self._unread = 1 if asynchronous else 0  # the number of newest steps that `verdict` does not read
        self._bad_steps: list[int] = []  # the numbers of bad steps among the last _WINDOW steps
        self._buffers: dict[
            torch.dtype, list[torch.Tensor]
        ] = {}  # by dtype, because one kernel copies all buffers of a dtype
        persistent = model.state_dict().keys()
        for buffer in (buffer for name, buffer in model.named_buffers() if name in persistent):
            self._buffers.setdefault(buffer.dtype, []).append(buffer)
        self._kept = {dtype: [torch.empty_like(b) for b in buffers] for dtype, buffers in self._buffers.items()}
        self._is_kept = False  # whether a step has started whose buffers can be restored
        self._found: deque[tuple[int, AsyncRead]] = (
            deque()
        )  # steps without a verdict: the counts of bad values, and the scale

    @torch.no_grad()
    def keep(self) -> None:
        """Copies the model's buffers; to be called before the forward pass."""
        for dtype, buffers in self._buffers.items():
            torch._foreach_copy_(self._kept[dtype], buffers)
        self._is_kept = True

    @torch.no_grad()
    def undo(self) -> None:
        """Abandons a step that has started but is not finished: restores the buffers as they were before it."""
        if self._is_kept:
            for dtype, buffers in self._buffers.items():
                torch._foreach_copy_(buffers, self._kept[dtype])
        self._is_kept = False

    @torch.no_grad()
    def find_bad(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """Puts the buffers back where the step is bad. The host does not wait for the device.

        Args:
            step: the number of the step in the run, for messages and the limit.
            loss: scalar, this process's.
            grad_norm: scalar, of the unscaled gradients, before clipping.

        Returns:
            1.0 where the step must be skipped, else 0.0: a float32 scalar on the device, the same in all processes.
        """
        self._is_kept = False
        counts = sum_on_device(self._not_finite(loss, grad_norm), self.processes)
        scale = self.scaler.scale(
            torch.ones((1,), device=loss.device)
        ).double()  # get_scale() would wait for the device
        self._found.append((step, AsyncRead(torch.cat([counts, scale]))))
        bad = counts.any()
        for dtype, buffers in self._buffers.items():  # no arithmetic can restore them, because NaN times 0 is NaN
            for buffer, kept in zip(buffers, self._kept[dtype], strict=True):
                torch.where(bad, kept, buffer, out=buffer)
        return bad.float()

    def verdict(self, *, all_steps: bool = False) -> Verdict:
        """Judges the steps that have no verdict yet: all of them or, with `asynchronous` and without `all_steps`, all
        but the newest.

        All processes must ask about the same steps, and all get the same answer.

        Raises:
            NonFinite: `on_nonfinite` is stop, or more than `max_nonfinite` steps were bad. The bad step was skipped.
        """
        answer = Verdict("step")
        while len(self._found) > (0 if all_steps else self._unread):
            step, found = self._found.popleft()
            *bad, scale = found.read()
            if any(bad):
                answer = self._judge(step, bad, scale)
            if answer.action == "rollback":
                self._found.clear()  # loading the checkpoint undoes those steps
        return answer

    def _not_finite(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """1 or 0 for loss, gradients and batch-norm statistics of this process: float64 (3,), on the device."""
        # An activation above 1e19 has an infinite variance, which the loss does not show: x / inf is 0.
        statistics = self._buffers.get(torch.float32, [loss.new_zeros(())])
        largest = torch.nn.utils.get_total_norm(statistics, norm_type=float("inf"))
        values = torch.stack([value.to(loss.device, torch.float32) for value in (loss.detach(), grad_norm, largest)])
        return (~torch.isfinite(values)).double()

    def _judge(self, step: int, bad: Sequence[float], scale: float) -> Verdict:
        """The verdict on a bad step. `bad` has the number of processes for each value of `_not_finite`."""
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
