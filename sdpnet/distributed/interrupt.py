"""Stopping between two steps: SIGINT, SIGTERM, SIGUSR1 and SIGHUP are recorded for the training loop."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Final

__all__ = ["STOP_SIGNALS", "stop_signals"]

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects the signals that stop a training, so that the loop can stop between two steps.

    These are SIGINT (a second one stops at once), SIGTERM, SIGUSR1 (which SLURM sends before the time limit with
    `--signal=USR1@120`) and SIGHUP (which a closed terminal sends) unless the process was started by `nohup`.

    Yields:
        The numbers of the signals received so far, in their order; the list grows.
    """
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    # nohup starts a process with SIGHUP ignored; such a process must survive a closed terminal.
    under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = [number for number in STOP_SIGNALS if not (under_nohup and number == signal.SIGHUP)]
    previous = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
