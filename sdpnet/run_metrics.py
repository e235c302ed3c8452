"""What a run directory tells of its training: the resolved config and the numbers of `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipelines.errors import UserError
from pipelines.layout import MANIFEST_NAME

__all__ = ["Run", "Series", "config_differences", "figures", "read_runs"]


@dataclass(frozen=True, eq=False)
class Series:
    """One quantity of a run, in the order of steps: float64 (n,) each; values may be NaN or infinite."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        return self.values[np.isfinite(self.values)]


@dataclass(frozen=True, eq=False)
class Run:
    """One run.

    Attributes:
        name: as it is called beside the others.
        config: value by full key ("optim.lr").
        series: by its name in `metrics.jsonl`.
        epoch_ends: float64 (n, 2), rising, from (0, 0): step and epochs done there. Known at evaluations.
        finished: whether it left `model.safetensors`.
        unreadable: lines of `metrics.jsonl` that are no JSON object with a step.
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
        """Epochs done at these steps; needs one evaluation. Beyond the last one, the last epoch's pace goes on."""
        at, epochs = self.epoch_ends.T
        pace = (epochs[-1] - epochs[-2]) / (at[-1] - at[-2])
        return np.interp(steps, at, epochs) + np.maximum(steps - at[-1], 0) * pace


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """The runs, each with a name of its own: the directory's, or where those are alike the path as it was given.

    Raises `UserError` for a directory that holds no run, or a config that is no YAML.
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
            config = yaml.safe_load(config_path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError):
            config = None
        if not isinstance(config, dict):
            raise UserError(f"{config_path}: not a config; move it away to report the run without it")
    lines: list[dict[str, Any]] = []
    unreadable = 0
    if metrics_path.is_file():
        with metrics_path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                line = _line(text)
                if line is None:
                    unreadable += 1
                else:
                    lines.append(line)
    lines.sort(key=lambda line: line["step"])
    points: dict[str, list[tuple[float, float]]] = {}
    ends = {0.0: 0.0}
    for line in lines:
        for key, value in line.items():
            if key not in ("epoch", "step") and isinstance(value, (int, float)) and not isinstance(value, bool):
                points.setdefault(key, []).append((line["step"], float(value)))
        epochs = line["epoch"] + 1 if "top1" in line and isinstance(line.get("epoch"), int) else 0
        if epochs > max(ends.values()) and line["step"] > max(ends):
            ends[line["step"]] = epochs
    series = {key: Series(*np.array(pairs, np.float64).T) for key, pairs in points.items()}
    finished = (directory / "model.safetensors").is_file()
    return Run(name, dict(_flat(config, "")), series, np.array(list(ends.items())), finished, unreadable)


def _no_run(directory: Path) -> str:
    """Why this is no run, and what to do."""
    if (directory / MANIFEST_NAME).is_file():
        return "a shard set, which sdpnet inspect shows; give a run's --out"
    if directory.is_file():
        return "a file; give the folder of a run, its --out"
    parent = directory.parent
    if not directory.exists() and parent.is_dir():
        beside = {path.name: path for path in sorted(parent.iterdir()) if (path / "metrics.jsonl").is_file()}
        if near := get_close_matches(directory.name, beside, n=1):
            return f"it is not there; did you mean {beside[near[0]]}?"
    return "neither config.yaml nor metrics.jsonl is there; give a run's --out"


def _line(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
        return {**line, "step": float(line["step"])} if np.isfinite(float(line["step"])) else None
    except (ValueError, KeyError, TypeError):
        return None


def _flat(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{where}.{key}" if where else str(key))
    else:
        yield where, value


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The keys whose values are not the same in all runs that have a config: (key, its value in each run as text, "-"
    where it is not set), in the configs' order."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = []
    for key in keys:
        values = [str(run.config.get(key, "-")) for run in runs]
        if len({value for value, run in zip(values, runs, strict=True) if run.config}) > 1:
            rows.append((key, values))
    return rows


def figures(run: Run) -> list[tuple[str, str]]:
    """Where the run stands and what it reached: (name, text); "-" is not known."""

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
