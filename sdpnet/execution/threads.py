"""The number of threads with which torch computes on a CPU: one for each core that is free.

By default torch uses a thread for each core. Where other programs use the cores too, all threads wait at the end of
each operation for the one that the system has suspended. Training on two busy cores fell to a tenth of the speed of one
thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from sdpnet.pipelines.machine import busy_cores, core_share, usable_cores

__all__ = ["ThreadChoice", "choose_threads", "use_threads"]

_EXPLICIT: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # torchrun sets the first


@dataclass(frozen=True)
class ThreadChoice:
    """A number of threads and the reason for it. `reduced` is True where the reason is the load of other processes."""

    count: int
    reason: str
    reduced: bool = False

    def __str__(self) -> str:
        return f"threads: {self.count} ({self.reason})"


def choose_threads(
    processes: int = 1, recorded: int | None = None, *, busy: Callable[[], float] = busy_cores
) -> ThreadChoice:
    """The number of threads for each process.

    A number in the environment (OMP_NUM_THREADS, which torchrun sets, or MKL_NUM_THREADS) is kept. A run that continues
    uses the number that it began with, because sums over another number of threads differ in their last bits. In all
    other cases it is the number of cores that this process may use (by affinity and the container's limit), less those
    that other programs keep busy, and never more than torch uses at present. Several processes of one training share
    the cores equally instead: they start together and would take each other for other programs.

    Args:
        processes: the number of processes of this training on this machine.
        recorded: the number of threads with which a run that continues began, or None.
        busy: measures the number of cores that other processes use.
    """
    present, share, cores = torch.get_num_threads(), core_share(processes), len(usable_cores())
    explicit = next((name for name in _EXPLICIT if os.environ.get(name)), None)
    if explicit is not None:
        differs = recorded is not None and recorded != present
        began = f"; the run began with {recorded}: losses may differ in their last bits" if differs else ""
        return ThreadChoice(present, f"{explicit} is set{began}")
    limited = f"of {cores} cores" if share == cores else f"this process's share of {cores} cores"
    if recorded is not None:
        if recorded <= share:
            return ThreadChoice(recorded, "as the run began, so that it continues to the bit")
        limited += f"; the run began with {recorded}: losses may differ in their last bits"
    count = min(present, share)
    taken = busy() if processes == 1 and count > 1 else 0.0
    free = max(1, round(cores - taken))
    if free < count:
        return ThreadChoice(
            free, f"{limited}: other processes keep {taken:.1f} busy; OMP_NUM_THREADS sets another number", reduced=True
        )
    return ThreadChoice(count, limited)


def use_threads(processes: int = 1, recorded: int | None = None) -> ThreadChoice:
    """Sets torch's number of threads to what `choose_threads` returns."""
    choice = choose_threads(processes, recorded)
    if choice.count != torch.get_num_threads():
        torch.set_num_threads(choice.count)
    return choice
