"""Runs an experiment: its rounds and trainings, the choice of epochs for a given time, and the results as they come."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from sdpnet.lab.compute import training_macs
from sdpnet.lab.experiment import Experiment, Training, trainings_of, write_experiment
from sdpnet.lab.plot import as_svg
from sdpnet.lab.process import is_finished, log_of, run_trainings
from sdpnet.lab.results import Comparison, Result, comparisons, read_result
from sdpnet.lab.table import as_json
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files.atomic_write import publish_bytes
from sdpnet.reporting.output import say

__all__ = ["Runner", "epochs_that_fit"]

_PILOT_EPOCHS: Final = 2
_MARGIN: Final = 1.08  # epochs vary


class Runner:
    """An experiment that runs in this process.

    Args:
        out: the directory of the experiment, which exists.
        num_classes: the number of classes of the shard set.
        jobs: the number of trainings at a time.
        seconds: the time for everything, or None.
        facts: about this machine, for the JSON file.

    Attributes:
        results: those of all trainings that have ended.
    """

    def __init__(
        self,
        out: Path,
        experiment: Experiment,
        num_classes: int,
        *,
        jobs: int = 1,
        seconds: float | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.out, self.experiment, self.jobs = out, experiment, jobs
        self.results: list[Result] = []
        self._num_classes, self._facts = num_classes, dict(facts or {})
        self._ends = math.inf if seconds is None else time.monotonic() + seconds
        self._rates: list[float] = []  # seconds of a training for each unit of compute
        self._count = 0

    def choose_epochs(self) -> None:
        """Sets the number of epochs to what fits into the time, after a training of two epochs that is not kept.

        Raises `UserError` if not even one epoch of each training fits.
        """
        say(f"{_PILOT_EPOCHS} epochs of the baseline show how long a training takes")
        first = next(self._trainings(0, [self.experiment.baseline], replace(self.experiment, epochs=_PILOT_EPOCHS)))
        config = replace(first.config, train=replace(first.config.train, log_interval=1))
        pilot = replace(first, config=config, directory=self.out / "runs" / "pilot")
        shutil.rmtree(pilot.directory, ignore_errors=True)
        took: list[float] = []

        def ended(training: Training, status: int, seconds: float) -> None:
            if status:
                raise _first_failure(training)
            took.append(seconds)

        run_trainings([pilot], self.jobs, ended)
        lines = [json.loads(line) for line in (pilot.directory / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step_ms"] for line in lines if line["epoch"] == _PILOT_EPOCHS - 1 and "step_ms" in line]
        epoch = (
            sum(steps) / 1000
        )  # of the largest images, so that it is too long rather than too short for a growing recipe
        left, other = self._ends - time.monotonic(), took[0] - epoch
        epochs = epochs_that_fit(self.experiment, self._num_classes, left * self.jobs, epoch, other)
        say(f"an epoch takes {epoch:,.1f} s, everything else of a training {other:,.1f} s: {epochs} epochs fit")
        self.experiment = replace(self.experiment, epochs=epochs)
        shutil.rmtree(pilot.directory)

    def run(self) -> bool:
        """Runs all trainings that are missing. Returns False if the time did not suffice for all of them."""
        write_experiment(self.out, self.experiment)
        names = [variant.name for variant in self.experiment.everyone]
        for round in range(self.experiment.rounds):
            trainings = list(self._trainings(round, names, self.experiment))
            if self.experiment.rounds > 1:
                say(f"round {round + 1} of {self.experiment.rounds}: {len(names) - 1} variants and the baseline")
            if not self._run(trainings):
                return False
            rows = {row.variant: row for row in self.save() if row.round == round}
            scores = {name: rows[name].difference for name in names if rows[name].differences}
            names = self.experiment.survivors(scores)
        return True

    def save(self) -> list[Comparison]:
        """Writes OUT/lab.json and OUT/lab.svg, and returns the rows of the table."""
        rows = comparisons(self.results, self.experiment.baseline)
        publish_bytes(self.out / "lab.json", as_json(self.experiment, self.results, rows, self._facts))
        publish_bytes(self.out / "lab.svg", as_svg(rows, self.experiment).encode())
        return rows

    def _trainings(self, round: int, names: Sequence[str], experiment: Experiment) -> Iterator[Training]:
        return trainings_of(experiment, round, names, self._num_classes, self.out)

    def _run(self, trainings: list[Training]) -> bool:
        number = len(trainings)
        missing = [training for training in trainings if not is_finished(training)]
        for training in trainings:
            if training not in missing:
                self.results.append(read_result(training, self.out))
        done = number - len(missing)
        if done:
            say(f"{done} of {number} trainings are there already")
        self.save()
        begun = 0

        def proceed(training: Training) -> bool:
            nonlocal begun
            expected = max(self._rates, default=0.0) * training.compute
            if time.monotonic() + expected > self._ends:
                return False
            begun += 1
            return True

        def ended(training: Training, status: int, seconds: float) -> None:
            nonlocal done
            done += 1
            failure = f"status {status}: {last_line(training)}" if status else ""
            result = read_result(training, self.out, failure)
            self.results.append(result)
            self._rates.append(seconds / training.compute)
            rows = {row.variant: row for row in self.save()}
            say(f"[{done}/{number}] {self._line(result, seconds, rows[training.variant])}")
            if failure and done == 1:
                raise _first_failure(training)

        run_trainings(missing, self.jobs, ended, proceed)
        return begun == len(missing)

    def _line(self, result: Result, seconds: float, row: Comparison) -> str:
        what = f"{result.variant}, seed {result.seed}, {result.epochs} epoch{'s' * (result.epochs > 1)}: "
        if result.failure:
            return f"{what}failed after {seconds:,.0f} s: {result.failure}"
        points = ""
        if row.differences and result.variant != self.experiment.baseline:
            points = f", {100 * row.differences[-1]:+.2f} points"
        return f"{what}top-1 {result.top1:.2%}{points}, {seconds:,.0f} s"


def last_line(training: Training) -> str:
    """The last line of a training's log."""
    try:
        lines = log_of(training).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1].strip()[:300] if lines else "no output"


def _first_failure(training: Training) -> UserError:
    return UserError(f"the first training failed: {last_line(training)} (its output: {log_of(training)})")


def epochs_that_fit(
    experiment: Experiment, num_classes: int, seconds: float, epoch_seconds: float, other_seconds: float
) -> int:
    """The epochs of the baseline with which all trainings fit into the time, at most those of its config.

    Args:
        seconds: the time for all trainings, one after the other.
        epoch_seconds: the time of an epoch of the baseline.
        other_seconds: that of the rest of a training: its start, compilation and evaluation.

    Raises:
        UserError: less than one epoch fits.
    """
    configs = list(experiment.configs(num_classes).values())
    macs = [training_macs(config, num_classes) for config in configs]
    ratio = sum(macs) / len(macs) / macs[0]  # the baseline is the first
    number, total, variants = 0, 0.0, len(experiment.variants)
    for round in range(experiment.rounds):
        number += experiment.seeds * (1 + variants)
        total += experiment.seeds * (1 + variants) * ratio * 0.5 ** (experiment.rounds - 1 - round)
        variants = -(-variants // 2)
    epochs = math.floor((seconds - number * other_seconds) / (_MARGIN * epoch_seconds * total))
    if epochs < 1:
        needed = (number * other_seconds + _MARGIN * epoch_seconds * total) / 60
        raise UserError(
            f"--minutes: {number} trainings of one epoch take about {needed:,.1f} minutes, and {seconds / 60:,.1f} are "
            "left; give more minutes, or compare fewer variants or seeds"
        )
    return min(epochs, configs[0].train.epochs)
