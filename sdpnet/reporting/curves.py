"""Line charts as inline SVG: axes, ticks and labels, coloured by the page's own style."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sdpnet.pipelines.errors import printable
from sdpnet.pipelines.shards.label_width import label_width

__all__ = ["Curve", "chart", "number", "percent"]

WIDTH, HEIGHT = 420, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 16, 24, 38  # margins of the plot inside the SVG; LEFT grows with the labels' width
GAP: Final = 6  # between a label of the vertical axis and the plot
FLOOR: Final = HEIGHT - BOTTOM
COLUMNS: Final = 179  # of the plot, about two SVG units wide each
DOTS_UP_TO: Final = 40  # points of a curve; more are drawn without dots
LOG_FROM: Final = 30.0  # highest value over the median, from where the vertical axis is logarithmic, if it may be


@dataclass(frozen=True, eq=False)
class Curve:
    """One line of a chart.

    Attributes:
        name: what its points are called when the mouse is on them.
        x: float64 (n,), rising, finite.
        y: float64 (n,); what is not finite is a gap, marked at the top.
        hue: of its colour, in degrees (OKLCH).
        dashed: whether the line is.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    hue: float
    dashed: bool = False


def number(value: float, digits: int = 4) -> str:
    """Few characters: 0.0005, 950, 12.5k, 3M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 10_000):
            return f"{value / size:.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def percent(value: float, digits: int = 4) -> str:
    """A fraction in percent."""
    return f"{100 * value:.{digits}g} %"


def chart(
    curves: Sequence[Curve],
    *,
    label: str,
    x_label: str,
    x_end: float,
    text: Callable[[float, int], str] = number,
    from_zero: bool = False,
    may_be_log: bool = False,
) -> str:
    """The curves as one `<svg>` element.

    A long curve with over two points in a column of the plot becomes, column by column, the band from the lowest to
    the highest value, and the line of their mean: no extreme is lost.

    Args:
        label: of the vertical axis: what is measured.
        x_end: of the horizontal axis, which starts at 0; above 0.
        text: of a value in so many digits, on the vertical axis and in the points' titles.
        from_zero: whether the vertical axis includes 0.
        may_be_log: whether the vertical axis is logarithmic where the values are positive and the highest is far from
            their median.
    """
    finite = np.concatenate([np.zeros(0), *(curve.y[np.isfinite(curve.y)] for curve in curves)])
    axis = _Axis(finite, from_zero, may_be_log)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Curves: {label} by {x_label}">']
    digits = next((d for d in range(4, 16) if len({text(tick, d) for tick in axis.ticks}) == len(axis.ticks)), 16)
    tick_labels = [text(tick, digits) for tick in axis.ticks]
    left = max(LEFT, GAP + math.ceil(max(map(label_width, tick_labels), default=0)))

    def edge(column: Any) -> Any:
        """Where columns of the plot (numbers or an array) begin, in SVG units."""
        return left + (WIDTH - left - RIGHT) * column / COLUMNS

    for tick, tick_label in zip(axis.ticks, tick_labels, strict=True):
        at = float(axis.place(np.array([tick]))[0])
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{left - GAP}" y="{at + 4:.1f}" text-anchor="end">{tick_label}</text>')
    for tick in _round_ticks(0, x_end, 6):
        at = edge(tick / x_end * COLUMNS)
        parts.append(f'<line class="tick" x1="{at:.1f}" x2="{at:.1f}" y1="{FLOOR}" y2="{FLOOR + 4}"/>')
        middle = min(at, WIDTH - label_width(number(tick)) / 2)  # the last label ends within the drawing
        parts.append(f'<text x="{middle:.1f}" y="{FLOOR + 17}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<text class="label" x="0" y="11">{label}{", logarithmic" if axis.log else ""}</text>')
    parts.append(f'<text class="label" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{x_label}</text>')
    lost = sum(int(np.count_nonzero(~np.isfinite(curve.y))) for curve in curves)
    if lost:
        what = "1 value is not finite" if lost == 1 else f"{lost:,} values are not finite"
        parts.append(f'<text class="label" x="{WIDTH - RIGHT}" y="11" text-anchor="end">{what}</text>')
    for curve in curves:
        parts.append(f'<g style="--hue: {curve.hue:g}"><title>{html.escape(printable(curve.name))}</title>')
        ok = np.isfinite(curve.y)
        columns = np.minimum((curve.x / x_end * COLUMNS).astype(np.int64), COLUMNS - 1)
        line = f'class="line{" dashed" if curve.dashed else ""}"'
        if len(ok) > max(DOTS_UP_TO, 2 * len(np.unique(columns))):
            parts += _bands(columns, curve.y, axis, edge, line)
        else:
            x, y = edge(curve.x / x_end * COLUMNS), axis.place(np.where(ok, curve.y, 1.0))
            for first, last in _stretches(ok):
                parts.append(f'<path {line} d="{_path(x[first:last], y[first:last])}"/>')
                for index in range(first, last) if len(ok) <= DOTS_UP_TO or last - first == 1 else ():
                    there = f"{text(float(curve.y[index]), digits)} at {x_label} {number(float(curve.x[index]))}"
                    title = html.escape(f"{printable(curve.name)}: {there}")
                    parts.append(
                        f'<circle cx="{x[index]:.1f}" cy="{y[index]:.1f}" r="2"><title>{title}</title></circle>'
                    )
        for column in np.unique(columns[~ok]).tolist():
            parts.append(f'<path class="lost" d="M{edge(column + 0.5):.1f},{TOP - 8}v6"/>')
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def _bands(columns: np.ndarray, values: np.ndarray, axis: _Axis, edge: Callable[[Any], Any], line: str) -> list[str]:
    """From the lowest to the highest value of each column, and the mean; a column without a finite value is a gap."""
    ok = np.isfinite(values)
    occupied, begins, counts = np.unique(columns[ok], return_index=True, return_counts=True)
    low, high = (axis.place(extreme.reduceat(values[ok], begins)) for extreme in (np.minimum, np.maximum))
    mean = axis.place(np.add.reduceat(values[ok], begins) / counts)
    parts = []
    has_values = np.isin(np.unique(columns), occupied)
    for first, last in _stretches(has_values):
        begin = int(np.count_nonzero(has_values[:first]))
        part = slice(begin, begin + last - first)
        left, right = edge(occupied[part]), edge(occupied[part] + 1)
        upper, lower = np.repeat(high[part], 2), np.repeat(low[part], 2)
        across = np.stack([left, right], axis=1).reshape(-1)
        outline = _path(np.concatenate([across, across[::-1]]), np.concatenate([upper, lower[::-1]]))
        parts.append(f'<path class="band" d="{outline}Z"/>')
        parts.append(f'<path {line} d="{_path((left + right) / 2, mean[part])}"/>')
    return parts


class _Axis:
    """The vertical axis: its ticks, and where values lie, in SVG units."""

    def __init__(self, values: np.ndarray, from_zero: bool, may_be_log: bool) -> None:
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
        self.log = bool(may_be_log and not from_zero and low > 0 and high > LOG_FROM * float(np.median(values)))
        if from_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if low == high:
            reach = abs(low) / 2 or 1.0
            low, high = (low, low + reach) if from_zero else (low - reach, high + reach)
        self._low, self._high = (math.log10(low), math.log10(high)) if self.log else (low, high)
        if self.log:
            powers = range(math.floor(self._low), math.ceil(self._high) + 1)
            every = math.ceil(len(powers) / 6)
            steps = (1, 2, 5) if len(powers) <= 3 else (1,)
            ticks = [step * 10.0**power for power in powers if power % every == 0 for step in steps]
            self.ticks = [tick for tick in ticks if low <= tick <= high]
        else:
            self.ticks = _round_ticks(low, high, 5)

    def place(self, values: np.ndarray) -> np.ndarray:
        values = np.log10(values) if self.log else values
        return FLOOR - (FLOOR - TOP) * (values - self._low) / (self._high - self._low)


def _round_ticks(low: float, high: float, count: int) -> list[float]:
    """At most `count` + 1 multiples of 1, 2 or 5 times a power of ten, from `low` to `high`."""
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if (high - low) / step <= count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _stretches(ok: np.ndarray) -> list[tuple[int, int]]:
    """The runs of True: (first, one past the last)."""
    changes = np.flatnonzero(np.diff(np.concatenate([[False], ok, [False]]).astype(np.int8)))
    return list(zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True))


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))
