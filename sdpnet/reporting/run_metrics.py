"""The data of a run that a report shows: the resolved config and the numbers of `metrics.jsonl`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import numpy as np

from sdpnet.config.load import LARGEST_FLOAT
from sdpnet.config.yaml_text import read_yaml
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.shards.manifest import MANIFEST_NAME
from sdpnet.reporting.metrics_file import LAST_STEP, metrics_lines

__all__ = ["Run", "Series", "config_differences", "figures", "read_runs"]

_SMALLEST_FLOAT: Final = 1.4e-45  # the smallest float32 above 0


@dataclass(frozen=True, eq=False)
class Series:
    """One quantity of a run, in the order of steps.

    Both arrays are float64 (n,). Values are NaN, infinite or in the range of float32.
    """

    steps: np.ndarray
    values: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        return self.values[np.isfinite(self.values)]


@dataclass(frozen=True, eq=False)
class Run:
    """One run.

    Attributes:
        name: the name of the run in the report.
        config: each value by its dotted key ("optim.lr").
        series: each quantity by its name in `metrics.jsonl`.
        epoch_ends: float64 (n, 2), rising from (0, 0): a step and the number of epochs that are done after it. These
            are known from evaluations only.
        finished: whether the run has written `model.safetensors`.
        unreadable: the number of lines of `metrics.jsonl` that are not JSON objects with a step.
    """

    name: str
    config: Mapping[str, Any]
    series: Mapping[str, Series]
    epoch_ends: np.ndarray
    finished: bool
    unreadable: int

    @property
    def last_step(self) -> int:
        return max((int(series.steps[-1]) for series in self.series.values()), default=0)

    def epochs_at(self, steps: np.ndarray) -> np.ndarray:
        """The number of epochs done at each step. Needs an evaluation; after the last one, its rate is continued."""
        at, epochs = self.epoch_ends.T
        pace = (epochs[-1] - epochs[-2]) / (at[-1] - at[-2])
        return np.interp(steps, at, epochs) + np.maximum(steps - at[-1], 0) * pace

    @property
    def has_times(self) -> bool:
        """Whether the times of steps are known."""
        return "step_ms" in self.series and len(self.series["step_ms"].finite) > 0

    def minutes_at(self, steps: np.ndarray) -> np.ndarray:
        """The minutes that the steps up to each step took, without start and evaluations. Needs `has_times`.

        The time of a step is the mean of the log interval that it is in; after the last interval, that of the last one.
        """
        series = self.series["step_ms"]
        known = np.isfinite(series.values)
        at, minutes = series.steps[known], series.values[known] / 60_000
        done = np.cumsum(np.diff(at, prepend=0) * minutes)
        return np.interp(steps, [0, *at], [0, *done]) + np.maximum(steps - at[-1], 0) * minutes[-1]


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """Reads runs and gives each a name: that of its directory or, if two are equal, the path as it was given.

    Raises:
        UserError: a directory is not a run, or its config is not YAML.
    """
    names = [directory.resolve().name for directory in directories]
    return [
        _read(directory, name if names.count(name) == 1 else str(directory))
        for directory, name in zip(directories, names, strict=True)
    ]


def _read(directory: Path, name: str) -> Run:
    config_path, metrics_path = directory / "config.yaml", directory / "metrics.jsonl"
    if not config_path.is_file() and not metrics_path.is_file():
        raise UserError(f"{directory}: no run: {_no_run(directory)}")
    config: Any = {}
    if config_path.is_file():
        try:
            config = read_yaml(config_path) or {}
        except ValueError:
            config = None
        if not isinstance(config, dict):
            raise UserError(f"{config_path}: not a config; move it away to report the run without it")
    points: dict[str, dict[float, float]] = {}
    scored: dict[float, int] = {}
    unreadable = 0
    for _, line in metrics_lines(metrics_path) if metrics_path.is_file() else ():
        if line is None:
            unreadable += 1
            continue
        step, epoch = float(line["step"]), line.get("epoch")
        for key, value in line.items():
            number = None if key in ("epoch", "step") else _number(value)
            if number is not None:  # a killed run may have two lines for one step, of which the last one counts
                points.setdefault(key, {})[step] = number
        if "top1" in line and type(epoch) is int and 0 <= epoch < LAST_STEP:
            scored[step] = epoch + 1
    ends = {0.0: 0.0}
    for step in sorted(scored):
        if scored[step] > max(ends.values()) and step > max(ends):
            ends[step] = scored[step]
    series = {key: Series(*np.array(sorted(by_step.items()), np.float64).T) for key, by_step in points.items()}
    finished = (directory / "model.safetensors").is_file()
    return Run(name, dict(_flat(config, "")), series, np.array(list(ends.items())), finished, unreadable)


def _no_run(directory: Path) -> str:
    """The reason why `directory` is not a run, and the remedy."""
    if (directory / MANIFEST_NAME).is_file():
        return "a shard set, which sdpnet describe shows; give a run's --out"
    if directory.is_file():
        return "a file; give the folder of a run, its --out"
    parent = directory.parent
    if not directory.exists() and parent.is_dir():
        beside = {path.name: path for path in sorted(parent.iterdir()) if (path / "metrics.jsonl").is_file()}
        if near := get_close_matches(directory.name, beside, n=1):
            return f"it is not there; did you mean {beside[near[0]]}?"
    return "neither config.yaml nor metrics.jsonl is there; give a run's --out"


def _number(value: Any) -> float | None:
    """`value` as a float in the range of float32 (above it infinite, below it 0), or None if it is not a number."""
    if type(value) not in (int, float):
        return None
    if abs(value) > LARGEST_FLOAT:
        return math.copysign(math.inf, value if type(value) is float else (-1 if value < 0 else 1))
    return float(value) if not abs(value) < _SMALLEST_FLOAT else 0.0


def _flat(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{where}.{key}" if where else str(key))
    else:
        yield where, value


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The keys whose values differ between the runs that have a config, in the order of the configs.

    Returns:
        Pairs of a key and its value in each run as text, "-" where it is not set.
    """
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = []
    for key in keys:
        values = [str(run.config.get(key, "-")) for run in runs]
        if len({value for value, run in zip(values, runs, strict=True) if run.config}) > 1:
            rows.append((key, values))
    return rows


def figures(run: Run) -> list[tuple[str, str]]:
    """The progress and the best results of a run, as pairs of a name and a text; "-" is for unknown values."""

    def last(key: str, form: str) -> str:
        series = run.series.get(key)
        return "-" if series is None else format(series.values[-1], form)

    def best(key: str) -> str:
        series = run.series.get(key)
        if series is None or not len(series.finite):
            return "-"
        index = int(np.nanargmax(np.where(np.isfinite(series.values), series.values, np.nan)))
        at = series.steps[index : index + 1]
        where = f"epoch {run.epochs_at(at)[0]:.4g}" if len(run.epoch_ends) > 1 else f"step {at[0]:,.0f}"
        return f"{series.values[index]:.2%} ({where})"

    def middle(key: str, form: str) -> str:
        series = run.series.get(key)
        return "-" if series is None or not len(series.finite) else format(float(np.median(series.finite)), form)

    planned = run.config.get("train.epochs")
    done = "-"
    if len(run.epoch_ends) > 1:
        done = f"{run.epochs_at(np.array([float(run.last_step)]))[0]:.4g}{f' of {planned}' if planned else ''}"
    return [
        ("state", "finished" if run.finished else "not finished"),
        ("epochs", done),
        ("steps", f"{run.last_step:,}"),
        ("training loss, last", last("train_loss", ".4f")),
        ("validation loss, last", last("val_loss", ".4f")),
        ("top-1, last", last("top1", ".2%")),
        ("top-5, last", last("top5", ".2%")),
        ("top-1, best", best("top1")),
        ("EMA: validation loss, last", last("ema_val_loss", ".4f")),
        ("EMA: top-1, last", last("ema_top1", ".2%")),
        ("EMA: top-5, last", last("ema_top5", ".2%")),
        ("EMA: top-1, best", best("ema_top1")),
        ("images/s, median", middle("images_per_second", ",.0f")),
        ("step, median", middle("step_ms", ",.1f") + (" ms" if "step_ms" in run.series else "")),
        ("waiting for data, median", middle("data_wait_fraction", ".1%")),
        ("GPU memory, last", last("gpu_memory_gb", ",.1f") + (" GB" if "gpu_memory_gb" in run.series else "")),
        ("GPU utilisation, median", middle("gpu_utilisation", ".0%")),
        ("lines that cannot be read", f"{run.unreadable:,}" if run.unreadable else "-"),
    ]
