"""A Chrome trace of the work of CPU and GPU in a few training steps, with named spans."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Final

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function, schedule

from sdpnet.checkpoints.model import write_atomically

__all__ = ["StepProfile"]

_NOTHING: Final = contextlib.nullcontext()
_RECORDING: Final = (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)


class StepProfile:
    """Records training steps into a trace file, which chrome://tracing and ui.perfetto.dev display.

    The training loop calls `step()` after each step and runs the parts of a step within `with mark("forward"): ...`. If
    training ends early, the file has the steps that were recorded until then.

    Args:
        path: the trace file.
        steps: (first, count): the first recorded step, counted from 1 at the start of this process, and the number of
            steps. `first` must be at least 2, because the step before it warms up the profiler. With (0, 0) nothing is
            recorded.
        say: is called with one line of text when the file was written, or could not be written.
    """

    def __init__(
        self, path: Path, steps: tuple[int, int], device: torch.device, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self._path = path
        self._device = device
        self._say = say
        self._profile: profile | None = None
        first, count = steps
        if count:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
            phases = schedule(skip_first=first - 2, wait=0, warmup=1, active=count, repeat=1)
            self._profile = profile(activities=activities, schedule=phases, on_trace_ready=self._write)

    def __enter__(self) -> StepProfile:
        if self._profile is not None:
            self._profile.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def mark(self, name: str) -> AbstractContextManager[object]:
        """A named span of the trace."""
        if self._profile is None or self._profile.current_action not in _RECORDING:
            return _NOTHING
        return record_function(name)

    def step(self) -> None:
        """Ends a step. After the last recorded step, this writes the file."""
        if self._profile is None:
            return
        action = self._profile.current_action
        if action in _RECORDING and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # so that the trace of the step includes all of its kernels
        if action == ProfilerAction.RECORD_AND_SAVE:
            self._end()
        else:
            self._profile.step()

    def _end(self) -> None:
        if self._profile is not None:
            ending, self._profile = self._profile, None
            ending.__exit__(None, None, None)

    def _write(self, finished: profile) -> None:
        try:
            write_atomically(self._path, lambda path: finished.export_chrome_trace(str(path)))
        except OSError as error:  # a full disk must not end the training
            self._say(f"profile: {self._path}: cannot be written ({error.strerror})")
            return
        self._say(f"profile: {self._path}; open it in chrome://tracing or ui.perfetto.dev")
