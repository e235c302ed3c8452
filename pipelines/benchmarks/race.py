"""The race of the benchmark: runs contestants in alternation on the same cores, and evaluates the results."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

from sdpnet.pipelines.benchmarks.process import BenchProcess, ContestantError
from sdpnet.pipelines.benchmarks.worker import Job, Round, Started
from sdpnet.pipelines.machine import usable_cores

__all__ = ["Entry", "Race", "run_race"]

REFERENCE: Final = "ffcv"


@dataclass
class Entry:
    """One contestant's results in a race. `reason` says why there are none; it is "" otherwise."""

    contestant: str
    reason: str = ""
    started: Started | None = None
    num_batches: int = 0
    rounds: list[Round] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """The images per second of each round."""
        return [round_.rate for round_ in self.rounds]


@dataclass(frozen=True)
class Race:
    """The results of all contestants at one image size on the same cores."""

    image_size: int
    cores: tuple[int, ...]
    entries: list[Entry]

    @property
    def running(self) -> list[Entry]:
        """The entries of contestants that could be measured."""
        return [entry for entry in self.entries if not entry.reason]

    @property
    def reference(self) -> Entry | None:
        """The entry that ratios refer to: FFCV's if it runs, else the first running one."""
        running = self.running
        return next((entry for entry in running if entry.contestant == REFERENCE), running[0] if running else None)

    def ratios(self, entry: Entry) -> list[float]:
        """The rate of `entry` divided by the reference's, round by round."""
        assert self.reference is not None
        return [mine / theirs for mine, theirs in zip(entry.rates, self.reference.rates, strict=True)]

    def mismatched(self) -> list[str]:
        """The contestants that follow the plan but delivered other samples than the first of them."""
        planned = [entry for entry in self.running if entry.rounds and entry.rounds[0].checksums]
        expected = max((entry.rounds[0].checksums for entry in planned), key=len, default=())
        return [e.contestant for e in planned if any(r.checksums != expected[: len(r.checksums)] for r in e.rounds)]

    @property
    def foreign(self) -> float | None:
        """The share of the cores' time that other processes took, as the median of all rounds; None if unknown."""
        shares = [r.foreign for entry in self.running for r in entry.rounds if r.foreign is not None]
        return statistics.median(shares) if shares else None


def run_race(
    jobs: list[Job], rounds: int, *, seconds: float, num_batches: int, say: Callable[[str], None] = lambda text: None
) -> Race:
    """Runs the rounds of one table.

    Args:
        jobs: the contestants' jobs, at one image size on the same cores.
        rounds: the number of rounds that count.
        seconds: the approximate length of a round, if `num_batches` is 0.
        num_batches: the number of batches in a round, or 0.
        say: shows a status text.
    """
    race = Race(jobs[0].image_size, jobs[0].cores, [Entry(job.contestant) for job in jobs])
    where = f"{race.image_size} px, {len(race.cores)} of {len(usable_cores())} cores"
    with ExitStack() as stack:
        processes = {}
        for job, entry in zip(jobs, race.entries, strict=True):
            say(f"{where}: {entry.contestant}: starting")
            process = processes[entry.contestant] = stack.enter_context(BenchProcess(job))
            try:
                entry.started = process.start()
                entry.num_batches = num_batches or process.calibrate(seconds)
            except ContestantError as error:
                entry.reason = str(error)
        for number in range(rounds + 1):
            for entry in race.running if number % 2 else reversed(race.running):
                say(f"{where}: {f'round {number} of {rounds}' if number else 'warm-up'}: {entry.contestant}")
                try:
                    measured = processes[entry.contestant].round(entry.num_batches)
                except ContestantError as error:
                    entry.reason = str(error)
                    continue
                if number:
                    entry.rounds.append(measured)
    return race
