"""The page about one or more runs: one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from sdpnet.pipelines.pages.chart import Chart
from sdpnet.pipelines.pages.document import render
from sdpnet.reporting.curves import Curve, chart, number, percent
from sdpnet.reporting.run_metrics import Run, config_differences, figures

__all__ = ["page", "summary"]

TEMPLATE: Final = Path(__file__).with_name("run_page.html.j2")


@dataclass(frozen=True)
class _Chart:
    """A quantity and its style.

    Attributes:
        title, label: the heading of the chart, and the label of its vertical axis.
        keys: the names in `metrics.jsonl`, first for the trained weights, then for the averaged ones, if any.
        text, from_zero, may_be_log: see `sdpnet.reporting.curves.chart`.
        over_time: whether it is drawn over the minutes of the steps, for comparisons of several runs only.
    """

    title: str
    label: str
    keys: tuple[str, ...]
    text: Callable[[float], str] = number
    from_zero: bool = False
    may_be_log: bool = False
    over_time: bool = False


CHARTS: Final = (
    _Chart("Training loss", "loss", ("train_loss",), may_be_log=True),
    _Chart("Validation loss", "loss", ("val_loss", "ema_val_loss"), may_be_log=True),
    _Chart("Top-1", "validation images", ("top1", "ema_top1"), percent),
    _Chart("Top-1 over time", "validation images", ("top1", "ema_top1"), percent, over_time=True),
    _Chart("Top-5", "validation images", ("top5", "ema_top5"), percent),
    _Chart("Learning rate", "lr", ("lr",), from_zero=True),
    _Chart("Gradient norm", "norm", ("grad_norm",), may_be_log=True),
    _Chart("Throughput", "images/s", ("images_per_second",), from_zero=True),
    _Chart("Step", "ms", ("step_ms",), from_zero=True),
    _Chart("Waiting for data", "share of the time", ("data_wait_fraction",), percent, from_zero=True),
    _Chart("GPU memory", "GB", ("gpu_memory_gb",), from_zero=True),
    _Chart("GPU utilisation", "share of the time", ("gpu_utilisation",), percent, from_zero=True),
)


def summary(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The rows of the table of final figures: a name, and a text for each run. Unknown figures are omitted."""
    rows = [(cells[0][0], [text for _, text in cells]) for cells in zip(*map(figures, runs), strict=True)]
    return [(name, texts) for name, texts in rows if any(text != "-" for text in texts)]


def page(runs: Sequence[Run]) -> str:
    """The complete HTML document."""
    colours = _colours(len(runs))
    charts = _charts(runs, colours)
    return render(
        TEMPLATE,
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        runs=[{"name": run.name, "colour": colour} for run, colour in zip(runs, colours, strict=True)],
        figures=summary(runs),
        charts=charts,
        averaged=any(key in run.series for run in runs for what in CHARTS for key in what.keys[1:]),
        differences=config_differences(runs),
    )


def _colours(count: int) -> list[str]:
    """Colours ("#rrggbb") that are visible on light and dark backgrounds.

    Up to ten runs have the colours of Plotly's palette, more runs those of a colour wheel.
    """
    from plotly.colors import qualitative, sample_colorscale, unlabel_rgb

    if count <= len(qualitative.D3):
        return [colour.lower() for colour in qualitative.D3[:count]]
    sampled = sample_colorscale("phase", [index / count for index in range(count)])
    return ["#" + "".join(f"{round(part):02x}" for part in unlabel_rgb(colour)) for colour in sampled]


def _charts(runs: Sequence[Run], colours: Sequence[str]) -> list[Chart]:
    """The charts, over epochs if these are known for all runs, else over steps."""
    trained = [run for run in runs if run.series]
    by_epoch = all(len(run.epoch_ends) > 1 for run in trained)
    timed = len(trained) > 1 and all(run.has_times for run in trained)

    def along(run: Run, steps: np.ndarray, over_time: bool) -> np.ndarray:
        if over_time:
            return run.minutes_at(steps)
        return run.epochs_at(steps) if by_epoch else steps

    charts = []
    for what in CHARTS:
        if what.over_time and not timed:
            continue
        ends = [float(along(run, np.array([float(run.last_step)]), what.over_time)[0]) for run in trained]
        curves = []
        for run, colour in zip(runs, colours, strict=True):
            for is_average, key in enumerate(what.keys):
                if key in run.series:
                    name = run.name + (", EMA" if is_average else "")
                    x = along(run, run.series[key].steps, what.over_time)
                    curves.append(Curve(name, x, run.series[key].values, colour, dashed=bool(is_average)))
        if curves:
            drawn = chart(
                curves,
                title=what.title,
                label=what.label,
                x_label="minutes of steps" if what.over_time else "epoch" if by_epoch else "step",
                x_end=max(ends) or 1.0,
                text=what.text,
                from_zero=what.from_zero,
                may_be_log=what.may_be_log,
            )
            charts.append(drawn)
    return charts
