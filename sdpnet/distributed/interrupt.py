"""Stopping between two steps: SIGINT, SIGTERM, SIGUSR1 and SIGHUP are noted, and the loop asks."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Final

__all__ = ["STOP_SIGNALS", "stop_signals"]

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects the signals that stop a training, so that the loop stops between two steps.

    SIGINT (a second Ctrl-C stops at once), SIGTERM, SIGUSR1 (what SLURM sends before the time is up, with
    `--signal=USR1@120`), and SIGHUP (what a closed terminal sends), unless the process was started by `nohup`.
    """
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    without_terminal = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = [number for number in STOP_SIGNALS if not (without_terminal and number == signal.SIGHUP)]
    previous = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
