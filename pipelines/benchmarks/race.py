"""The race of the benchmark: contestants on the same cores, by turns, and what came of it."""

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
    """One contestant's part in a race: what it did, or in `reason` why it did nothing."""

    contestant: str
    reason: str = ""
    started: Started | None = None
    num_batches: int = 0
    rounds: list[Round] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        return [round_.rate for round_ in self.rounds]


@dataclass(frozen=True)
class Race:
    """All contestants at one image size on the same cores."""

    image_size: int
    cores: tuple[int, ...]
    entries: list[Entry]

    @property
    def running(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.reason]

    @property
    def reference(self) -> Entry | None:
        """What the ratios are to: FFCV where it runs, else the first that runs."""
        running = self.running
        return next((entry for entry in running if entry.contestant == REFERENCE), running[0] if running else None)

    def ratios(self, entry: Entry) -> list[float]:
        """`entry`'s rate by the reference's, round by round."""
        assert self.reference is not None
        return [mine / theirs for mine, theirs in zip(entry.rates, self.reference.rates, strict=True)]

    def strays(self) -> list[str]:
        """Contestants that follow the plan and delivered other samples than the first of them."""
        planned = [entry for entry in self.running if entry.rounds and entry.rounds[0].checksums]
        expected = max((entry.rounds[0].checksums for entry in planned), key=len, default=())
        return [e.contestant for e in planned if any(r.checksums != expected[: len(r.checksums)] for r in e.rounds)]

    @property
    def foreign(self) -> float | None:
        """The median share of the cores' time, over all rounds, that went elsewhere; None where Linux does not say."""
        shares = [r.foreign for entry in self.running for r in entry.rounds if r.foreign is not None]
        return statistics.median(shares) if shares else None


def run_race(
    jobs: list[Job], rounds: int, *, seconds: float, num_batches: int, say: Callable[[str], None] = lambda text: None
) -> Race:
    """Runs the rounds of one table. `num_batches` a round, or with 0 as many as take about `seconds`."""
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
