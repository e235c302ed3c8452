"""The results of trainings, and their differences from the baseline with standard errors."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpnet.lab.experiment import Training
from sdpnet.pipelines.errors import UserError

__all__ = ["Comparison", "Result", "comparisons", "read_result"]


@dataclass(frozen=True)
class Result:
    """The result of a training.

    Attributes:
        variant, seed, round: of which training.
        epochs: its epochs.
        compute: its operations as a multiple of those of the baseline in the last round.
        run: its directory, within that of the experiment.
        scores: the last evaluation, as in `metrics.jsonl`; empty if the training failed.
        seconds: the time of its steps, without start and evaluation.
        failure: the last line of its log if it failed, else "".
    """

    variant: str
    seed: int
    round: int
    epochs: int
    compute: float
    run: str
    scores: dict[str, float]
    seconds: float = 0.0
    failure: str = ""

    @property
    def top1(self) -> float:
        """The top-1 accuracy of the published weights, in [0, 1]: of the average, if there is one."""
        return self.scores.get("ema_top1", self.scores["top1"])


def read_result(training: Training, out: Path, failure: str = "") -> Result:
    """Reads the result of a training that has ended."""
    scores: dict[str, float] = {}
    seconds = 0.0
    path = training.directory / "metrics.jsonl"
    if not failure:
        try:
            lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            evaluations = [line for line in lines if "top1" in line]
            scores = {name: value for name, value in evaluations[-1].items() if name not in ("epoch", "step")}
        except (OSError, ValueError, IndexError):
            raise UserError(f"{path}: has no evaluation; remove {training.directory} to train it again") from None
        steps = [line["step_ms"] for line in lines if "step_ms" in line]
        seconds = sum(steps) * training.config.train.log_interval / 1000
    return Result(
        training.variant,
        training.seed,
        training.round,
        training.config.train.epochs,
        round(training.compute, 4),
        str(training.directory.relative_to(out)),
        scores,
        round(seconds, 1),
        failure,
    )


@dataclass(frozen=True)
class Comparison:
    """A variant beside the baseline, in the last round that it trained in.

    Attributes:
        variant: its name.
        round, epochs, compute: see `Result`.
        top1: the fractions of its seeds, in their order.
        differences: those from the baseline of the same seed.
        seconds: the mean time of its steps.
        failures: the number of its trainings that failed.
    """

    variant: str
    round: int
    epochs: int
    compute: float
    top1: tuple[float, ...]
    differences: tuple[float, ...]
    seconds: float
    failures: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.top1) if self.top1 else math.nan

    @property
    def difference(self) -> float:
        """The mean difference; NaN if there is none."""
        return statistics.fmean(self.differences) if self.differences else math.nan

    @property
    def error(self) -> float:
        """The standard error of the mean difference, from its spread over the seeds; NaN for fewer than two seeds."""
        return _error(self.differences)

    @property
    def mean_error(self) -> float:
        """The standard error of the mean top-1; NaN for fewer than two seeds."""
        return _error(self.top1)

    @property
    def better(self) -> int:
        """The number of seeds in which it is better than the baseline."""
        return sum(difference > 0 for difference in self.differences)


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def comparisons(results: Sequence[Result], baseline: str) -> list[Comparison]:
    """Compares each variant with the baseline: the baseline first, then by round and difference, the best first.

    A difference is between trainings of the same round and seed, which start from the same random numbers.
    """
    base = {(one.round, one.seed): one.top1 for one in results if one.variant == baseline and not one.failure}
    found = []
    for name in dict.fromkeys(one.variant for one in results):
        last = max(one.round for one in results if one.variant == name)
        rows = sorted((one for one in results if (one.variant, one.round) == (name, last)), key=lambda one: one.seed)
        good = [one for one in rows if not one.failure]
        pairs = [(one.top1, base[last, one.seed]) for one in good if (last, one.seed) in base and name != baseline]
        found.append(
            Comparison(
                variant=name,
                round=last,
                epochs=rows[0].epochs,
                compute=rows[0].compute,
                top1=tuple(one.top1 for one in good),
                differences=tuple(top1 - other for top1, other in pairs),
                seconds=statistics.fmean(one.seconds for one in good) if good else math.nan,
                failures=len(rows) - len(good),
            )
        )

    def place(one: Comparison) -> tuple[bool, int, float]:
        return one.variant != baseline, -one.round, -one.difference if one.differences else math.inf

    return sorted(found, key=place)
