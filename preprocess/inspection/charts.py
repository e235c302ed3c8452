"""Histograms for Plotly, with bins whose widths are round numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sdpnet.pipelines.pages.chart import Chart, layout

__all__ = ["Axis", "compact", "histogram", "linear_axis", "ratio_axis"]

MAX_BINS: Final = 48
BAR: Final = "#5b8dbf"  # visible on light and dark backgrounds; the same as --bar in the style of the page
TICKS_OF_RATIOS: Final = 3  # the largest number of ticks on each side of 1:1 on axes beyond 4:1
LABEL: Final = 30 / 358  # the share of the axis that a label takes, with the space beside it


@dataclass(frozen=True, eq=False)
class Axis:
    """A horizontal axis.

    Attributes:
        label: the quantity, with its unit.
        edges: float64 (bins + 1,), ascending, in the unit of the values.
        ticks: (value, text), ascending; if empty, Plotly chooses the ticks.
        log: whether the axis is logarithmic.
    """

    label: str
    edges: np.ndarray
    ticks: tuple[tuple[float, str], ...] = ()
    log: bool = False

    def position(self, value: Any) -> Any:
        """The positions of values (a number or an array) on the axis: the values, or their logarithms to the base 2."""
        return np.log2(value) if self.log else value


def compact(value: float) -> str:
    """Formats a number with few characters: 950, 5,000, 12.5k, 3M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= max(size, 10_000):
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}"


def linear_axis(values: np.ndarray, label: str) -> Axis:
    """Returns an axis for integers, with bins whose width is a round integer.

    It starts at 0, or at the lowest value if that is at least half of the highest, and ends at the highest value. If
    the highest value is more than twice the 99.5th percentile, the axis ends at that percentile, because a few extreme
    values would otherwise compress all others.
    """
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 1)
    if len(values) and high > 2 * (percentile := float(np.quantile(values, 0.995))):
        high = math.ceil(percentile)
    if low < 0.5 * high:
        low = 0
    step = _round_step((high - low + 1) / MAX_BINS)
    single = low == high
    first, last = low // step - (single and low > 0), high // step + 1 + single
    edges = np.arange(first, last + 1, dtype=np.float64) * step - (0.5 if step == 1 else 0)
    return Axis(label, edges)


def ratio_axis(values: np.ndarray, label: str) -> Axis:
    """Returns a logarithmic axis for ratios that is symmetric about 1:1 and includes every value."""
    reach = max(0.8, float(np.abs(np.log2(values)).max()) if len(values) else 0)
    width = next(width for width in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1) if 2 * reach / width < MAX_BINS - 1)
    half = math.ceil(reach / width)
    edges = 2.0 ** (np.arange(-half, half + 2) * width - width / 2)
    doublings = math.floor(math.log2(edges[-1]))
    every = math.ceil(doublings / TICKS_OF_RATIOS)
    sides = [(2**power, 1) for power in range(every, doublings + 1, every)] if every else []
    if math.log2(4 / 3) > LABEL * 2 * math.log2(edges[-1]):  # the distance of 3:2 and 2:1 is enough for their labels
        sides += [(3, 2)]
    ticks = {1.0: "1:1"}
    for a, b in sides:
        ticks |= {a / b: f"{a}:{b}", b / a: f"{b}:{a}"}
    return Axis(label, edges, tuple(sorted(ticks.items())), log=True)


def histogram(values: np.ndarray, axis: Axis, label: str, title: str) -> Chart:
    """Returns a histogram. The number of values beyond the last edge is in the note of the chart.

    Args:
        values: (n,), numbers.
        axis: the horizontal axis; its edges are those of the bins.
        label: the label of the vertical axis, which says what is counted.
        title: the title of the chart.
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
        # The outline is one pixel wide at any height, so that a bin with one image of a million does not look empty.
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
    """The smallest number of 1, 2, 5, 10, 20, 50, ... that is at least `at_least`."""
    power = 10 ** max(0, math.floor(math.log10(max(1.0, at_least))))
    return next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= at_least)
