"""The time for which a GPU is idle because the next batch is not there yet."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["DataWait"]


class DataWait:
    """Measures on a CUDA stream for how long the stream waits for batches.

    The host runs ahead of the device, so the time that the host spends in `next(batches)` says little: it may wait
    while the device still computes. This class records an event on the stream before and after each wait. The time
    between the two is the time for which the stream had nothing to do. Neither recording nor reading waits for the
    device: waits that the device has not reached yet are part of the next reading.

    Args:
        device: the device that trains. On a CPU nothing is measured; there, the host's time is the device's.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._pending: deque[tuple[Any, Any]] = deque()  # (before, after) of waits that were not read yet
        self._since: Any = None  # the event at which the time of the next reading begins
        self._last = 0.0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """The context in which the next batch is taken and the stream is made to wait for it."""
        if self._stream is None:
            yield
            return
        before = self._stream.record_event(torch.cuda.Event(enable_timing=True))
        self._since = self._since or before
        yield
        self._pending.append((before, self._stream.record_event(torch.cuda.Event(enable_timing=True))))

    def restart(self) -> None:
        """Discards all waits so far. To be called before an epoch, so that an evaluation is not part of the time."""
        self._pending.clear()
        self._since, self._last = None, 0.0

    def read(self) -> float | None:
        """The fraction of the device's time since the last reading for which it waited for data, in [0, 1].

        It is None on a CPU. If the device has finished no wait since the last reading, that reading is repeated.
        """
        if self._stream is None:
            return None
        waited, last = 0.0, None
        while self._pending and self._pending[0][1].query():
            before, last = self._pending.popleft()
            waited += before.elapsed_time(last)
        if last is not None:
            elapsed = self._since.elapsed_time(last)
            self._since, self._last = last, waited / elapsed if elapsed > 0 else 0.0
        return self._last
