"""Histograms for Plotly, with bins of round widths."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sdpnet.pipelines.pages.chart import Chart, layout

__all__ = ["Axis", "compact", "histogram", "linear_axis", "ratio_axis"]

MAX_BINS: Final = 48
BAR: Final = "#5b8dbf"  # is seen on light and on dark paper; --bar of the page's style
TICKS_OF_RATIOS: Final = 3  # on each side of 1:1, at most, where the axis goes beyond 4:1


@dataclass(frozen=True, eq=False)
class Axis:
    """A horizontal axis.

    Attributes:
        label: what it measures.
        edges: float64 (bins + 1,), rising, in the units of the values.
        ticks: (value, text), rising; none leaves them to Plotly.
        log: equal distances are equal ratios.
    """

    label: str
    edges: np.ndarray
    ticks: tuple[tuple[float, str], ...] = ()
    log: bool = False

    def position(self, value: Any) -> Any:
        """Where values (a number or an array) are drawn: at themselves, or at their logarithms to the base 2."""
        return np.log2(value) if self.log else value


def compact(value: float) -> str:
    """A number in few characters: 950, 5,000, 12.5k, 3M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= max(size, 10_000):
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}"


def linear_axis(values: np.ndarray, label: str) -> Axis:
    """Bins of a round, whole width for whole numbers, from 0 (or from the lowest value, where 0 is far) to the highest.

    Where the highest value is over twice the 99.5th percentile, the axis ends behind that percentile.
    """
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 1)
    if len(values) and high > 2 * (common := float(np.quantile(values, 0.995))):
        high = math.ceil(common)
    if low < 0.5 * high:
        low = 0
    step = _round_step((high - low + 1) / MAX_BINS)
    alone = low == high
    first, last = low // step - (alone and low > 0), high // step + 1 + alone
    edges = np.arange(first, last + 1, dtype=np.float64) * step - (0.5 if step == 1 else 0)
    return Axis(label, edges)


def ratio_axis(values: np.ndarray, label: str) -> Axis:
    """Bins for ratios, on a logarithmic scale that is symmetric about 1:1 and reaches every value."""
    reach = max(0.8, float(np.abs(np.log2(values)).max()) if len(values) else 0)
    width = next(width for width in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1) if 2 * reach / width < MAX_BINS - 1)
    half = math.ceil(reach / width)
    edges = 2.0 ** (np.arange(-half, half + 2) * width - width / 2)
    doublings = math.floor(math.log2(edges[-1]))
    every = math.ceil(doublings / TICKS_OF_RATIOS)
    sides = [(2**power, 1) for power in range(every, doublings + 1, every)] if every else []
    sides += [(3, 2)] if doublings <= 2 else []
    ticks = {1.0: "1:1"}
    for a, b in sides:
        ticks |= {a / b: f"{a}:{b}", b / a: f"{b}:{a}"}
    return Axis(label, edges, tuple(sorted(ticks.items())), log=True)


def histogram(values: np.ndarray, axis: Axis, label: str, title: str) -> Chart:
    """How many values fall into each bin of the axis. Values beyond the last edge are counted in the chart's note.

    Args:
        values: (n,), numbers.
        axis: its edges are the bins.
        label: of the vertical axis: what is counted.
    """
    counts, edges = np.histogram(values, axis.edges)
    filled = np.flatnonzero(counts)
    rows = [[f"{edges[i]:,.4g} to {edges[i + 1]:,.4g}", f"{counts[i]:,}"] for i in filled.tolist()]
    places = axis.position(edges)
    bars = {
        "type": "bar",
        "x": ((places[filled] + places[filled + 1]) / 2).tolist(),
        "width": (places[filled + 1] - places[filled]).tolist(),
        "y": counts[filled].tolist(),
        "text": [f"{between}: {count}" for between, count in rows],
        "textposition": "none",
        "hovertemplate": "%{text}<extra></extra>",
        # The outline is one pixel wide whatever the height: a bin with one image of a million must not look empty.
        "marker": {"color": BAR, "line": {"color": BAR, "width": 1}},
    }
    x_axis: dict[str, Any] = {"title": {"text": axis.label}, "range": [float(places[0]), float(places[-1])]}
    if axis.ticks:
        x_axis |= {"tickvals": [float(axis.position(tick)) for tick, _ in axis.ticks]}
        x_axis |= {"ticktext": [text for _, text in axis.ticks]}
    y_axis = {"title": {"text": label}, "rangemode": "tozero", **({"dtick": 1} if counts.max() < 5 else {})}
    beyond = len(values) - int(counts.sum())
    return Chart(
        title,
        f"Histogram: {label} by {axis.label}",
        {"data": [bars], "layout": layout(x_axis, y_axis, bargap=0)},
        [axis.label, label],
        rows,
        f"{beyond:,} beyond, up to {compact(float(np.max(values)))}" if beyond else "",
    )


def _round_step(at_least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is at least this."""
    power = 10 ** max(0, math.floor(math.log10(max(1.0, at_least))))
    return next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= at_least)
