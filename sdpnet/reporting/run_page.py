"""The page about one or more runs: one HTML file that needs nothing else, no network and no script."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from sdpnet.pipelines.errors import printable
from sdpnet.reporting.curves import Curve, chart, number, percent
from sdpnet.reporting.run_metrics import Run, config_differences, figures

__all__ = ["page", "summary"]

HUES: Final = (255, 40, 150, 320, 85, 200, 10, 290)  # far apart for the first ones; more runs share the circle

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c1c1f; --muted: #65656c; --line: #e2e2e6; --paper: #fff; --tone: 52% .13 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e9; --muted: #9d9da6; --line: #35353c; --paper: #17171a; --tone: 74% .11 }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 1.75rem; line-height: 1.25; font-weight: 600; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; font-weight: 600; margin: 3rem 0 1rem; padding-top: 1rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; font-weight: 600; margin: 0 }
p { margin: 0 0 1.5rem; max-width: 46rem }
.muted, th { color: var(--muted); font-weight: 400 }
.name { unicode-bidi: isolate; overflow-wrap: anywhere }
.swatch { display: inline-block; width: 1.1em; height: .25em; margin-right: .5em; vertical-align: .2em;
  background: oklch(var(--tone) var(--hue)) }
.wide { overflow-x: auto }
table { border-collapse: collapse; min-width: 50% }
th, td { text-align: left; vertical-align: top; padding: .3rem 0 .3rem 1.5rem; border-bottom: 1px solid var(--line) }
td, thead th { min-width: 8rem }
th:first-child, thead td { position: sticky; left: 0; min-width: 8.5rem; padding-left: 0; background: var(--paper) }
thead th { color: var(--ink); font-weight: 600 }
.legend { position: sticky; top: 0; display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; margin: 0 0 1.5rem;
  padding: .5rem 0; list-style: none; background: var(--paper) }
@media (max-width: 34rem) { table { font-size: .85rem } }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 2rem }
svg { display: block; width: 100%; height: auto; font-size: 12px; margin: .5rem 0 0 }
svg text { fill: var(--ink) }
svg .label { fill: var(--muted) }
svg .grid { stroke: var(--line) }
svg .tick { stroke: var(--muted) }
svg .line, svg .lost { stroke: oklch(var(--tone) var(--hue)); stroke-width: 1.5; stroke-linejoin: round; fill: none }
svg .dashed { stroke-dasharray: 5 3 }
svg .band { fill: oklch(var(--tone) var(--hue)); opacity: .25 }
svg circle { fill: oklch(var(--tone) var(--hue)) }
"""


@dataclass(frozen=True)
class _Chart:
    """A quantity: heading, axis' label, names in `metrics.jsonl` (as trained, averaged), and how it is drawn."""

    title: str
    label: str
    keys: tuple[str, ...]
    text: Callable[[float, int], str] = number
    from_zero: bool = False
    may_be_log: bool = False


CHARTS: Final = (
    _Chart("Training loss", "loss", ("train_loss",), may_be_log=True),
    _Chart("Validation loss", "loss", ("val_loss", "ema_val_loss"), may_be_log=True),
    _Chart("Top-1", "validation images", ("top1", "ema_top1"), percent),
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
    """The table of final figures: for each known one its name and its text for each run."""
    rows = [(cells[0][0], [text for _, text in cells]) for cells in zip(*map(figures, runs), strict=True)]
    return [(name, texts) for name, texts in rows if any(text != "-" for text in texts)]


def page(runs: Sequence[Run]) -> str:
    """The whole HTML document."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    differences = config_differences(runs)
    sections = [_section("Figures", _table(runs, summary(runs))), _section("Curves", *_curves(runs))]
    if len(runs) > 1:
        text = "" if differences else '<p class="muted">All of it is the same.</p>'
        sections.append(_section("What differs in the configs", text or _table(runs, differences)))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{_text(title)}: training</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{_name(title)}</h1>\n" + "".join(sections) + "</main>\n</body>\n</html>\n"
    )


def _text(value: str) -> str:
    """Safe in HTML; what cannot be printed (control characters, marks that turn the direction of text) is escaped."""
    return html.escape(printable(value))


def _name(value: str) -> str:
    """Text that comes from the data, kept apart from the direction of the text around it."""
    return f'<span class="name">{_text(value)}</span>'


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n" + "\n".join(parts) + "\n</section>\n"


def _hue(index: int, count: int) -> float:
    return HUES[index] if count <= len(HUES) else 360 * index / count


def _label(runs: Sequence[Run], index: int) -> str:
    swatch = f'<span class="swatch" style="--hue: {_hue(index, len(runs)):g}"></span>'
    return swatch + _name(runs[index].name)


def _table(runs: Sequence[Run], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f'<th scope="col">{_label(runs, index)}</th>' for index in range(len(runs)))
    body = "".join(
        f'<tr><th scope="row">{_text(label)}</th>{"".join(f"<td>{_name(cell)}</td>" for cell in cells)}</tr>\n'
        for label, cells in rows
    )
    return (
        f'<div class="wide"><table>\n<thead><tr><td></td>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>'
    )


def _curves(runs: Sequence[Run]) -> list[str]:
    """By epochs where all runs know theirs, else by steps."""
    by_epoch = all(len(run.epoch_ends) > 1 for run in runs if run.series)
    x_label = "epoch" if by_epoch else "step"

    def along(run: Run, steps: np.ndarray) -> np.ndarray:
        return run.epochs_at(steps) if by_epoch else steps

    x_end = max((float(along(run, np.array([float(run.last_step)]))[0]) for run in runs if run.series), default=0.0)
    charts, averaged = [], False
    for what in CHARTS:
        curves = []
        for index, run in enumerate(runs):
            for number_of_key, key in enumerate(what.keys):
                if key in run.series:
                    name = run.name + (", EMA" if number_of_key else "")
                    x = along(run, run.series[key].steps)
                    hue = _hue(index, len(runs))
                    curves.append(Curve(name, x, run.series[key].values, hue, dashed=bool(number_of_key)))
        if curves:
            averaged |= any(curve.dashed for curve in curves)
            svg = chart(
                curves,
                label=what.label,
                x_label=x_label,
                x_end=x_end or 1.0,
                text=what.text,
                from_zero=what.from_zero,
                may_be_log=what.may_be_log,
            )
            charts.append(f"<div><h3>{what.title}</h3>\n{svg}</div>\n")
    if not charts:
        return ['<p class="muted">Nothing was measured yet: metrics.jsonl is not there or empty.</p>']
    note = "Where there are many values, the line is the mean and the band goes from the lowest to the highest."
    note += " Dashed: with averaged weights (EMA)." if averaged else ""
    legend = "".join(f"<li>{_label(runs, index)}</li>" for index in range(len(runs)))
    return [
        f'<p class="muted">{note}</p>',
        f'<ul class="legend">{legend}</ul>' if len(runs) > 1 else "",
        f'<div class="charts">\n{"".join(charts)}</div>',
    ]
