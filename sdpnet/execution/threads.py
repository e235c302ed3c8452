"""How many threads torch computes with on a CPU: as many as there are cores that are free for them.

torch takes a thread for each core. On cores that others use too, all of its threads then wait at the end of each
operation for the one that the system has stopped: training on two busy cores fell to a tenth of one thread's speed.
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
    """A number of threads and the reason for it. `reduced` says that other processes' load is the reason."""

    count: int
    reason: str
    reduced: bool = False

    def __str__(self) -> str:
        return f"threads: {self.count} ({self.reason})"


def choose_threads(
    processes: int = 1, recorded: int | None = None, *, busy: Callable[[], float] = busy_cores
) -> ThreadChoice:
    """The number of threads for each of `processes` on this machine.

    What the environment says (OMP_NUM_THREADS, which torchrun sets, or MKL_NUM_THREADS) is kept, and torch's present
    number is never raised, but for a run that continues: `recorded` is the number that it began with, and sums of
    another number of threads differ in their last bits. Otherwise it is the cores that this process may use (affinity
    and the container's limit), less those that others keep busy; several processes here, which begin together, would
    take each other for others, so that they divide the cores and nothing more.
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
    """Gives torch the number that `choose_threads` finds."""
    choice = choose_threads(processes, recorded)
    if choice.count != torch.get_num_threads():
        torch.set_num_threads(choice.count)
    return choice
