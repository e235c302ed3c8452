"""Histograms as inline SVG: axes, ticks and labels, coloured by the page's own style."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from sdpnet.pipelines.shards.label_width import label_width

__all__ = ["Axis", "compact", "histogram", "linear_axis", "ratio_axis"]

WIDTH, HEIGHT = 420, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 16, 22, 42  # margins of the plot inside the SVG; LEFT grows with the labels' width
GAP: Final = 6  # between a label of the vertical axis and the plot
MAX_BINS: Final = 48
LABEL_DISTANCE: Final = 38  # between the middles of two tick labels, in SVG units


@dataclass(frozen=True, eq=False)
class Axis:
    """A horizontal axis.

    Attributes:
        label: what it measures.
        edges: float64 (bins + 1,), rising, in the units of the values.
        ticks: (value, text), rising.
        log: equal distances are equal ratios.
    """

    label: str
    edges: np.ndarray
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def position(self, value: float) -> float:
        """Where a value lies: 0 at the first edge, 1 at the last."""
        low, high = float(self.edges[0]), float(self.edges[-1])
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)


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
    spacing = _round_step((edges[-1] - edges[0]) * LABEL_DISTANCE * 1.6 / (WIDTH - LEFT - RIGHT))
    ticks = range(math.ceil(edges[0] / spacing) * spacing, math.floor(edges[-1]) + 1, spacing)
    return Axis(label, edges, tuple((tick, compact(tick)) for tick in ticks))


def ratio_axis(values: np.ndarray, label: str) -> Axis:
    """Bins for ratios, on a logarithmic scale that is symmetric about 1:1 and reaches every value."""
    reach = max(0.8, float(np.abs(np.log2(values)).max()) if len(values) else 0)
    width = next(width for width in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1) if 2 * reach / width < MAX_BINS - 1)
    half = math.ceil(reach / width)
    axis = Axis(label, 2.0 ** (np.arange(-half, half + 2) * width - width / 2), (), log=True)
    ticks = {1.0: "1:1"}

    def fits(a: int, b: int) -> bool:
        place, text = axis.position(a / b), f"{a}:{b}"
        distances = [(abs(place - axis.position(tick)) * (WIDTH - LEFT - RIGHT), ticks[tick]) for tick in ticks]
        return all(
            far >= max(LABEL_DISTANCE, (label_width(text) + label_width(other)) / 2 + GAP) for far, other in distances
        )

    for a, b in ((2, 1), (4, 1), (3, 2), (3, 1), *((2**power, 1) for power in range(3, 17)), (4, 3)):
        if axis.position(a / b) <= 1 and fits(a, b):
            ticks |= {a / b: f"{a}:{b}", b / a: f"{b}:{a}"}
    return Axis(label, axis.edges, tuple(sorted(ticks.items())), log=True)


def histogram(values: np.ndarray, axis: Axis, label: str) -> str:
    """How many values fall into each bin of the axis, as one `<svg>` element.

    Values beyond the last edge are counted in a line of text at the upper right.

    Args:
        values: (n,), numbers.
        axis: its edges are the bins.
        label: of the vertical axis: what is counted.
    """
    counts, edges = np.histogram(values, axis.edges)
    top = max(1, int(counts.max()))
    spacing = _round_step(top / 4)
    left = max(LEFT, GAP + math.ceil(max(label_width(compact(count)) for count in range(0, top + 1, spacing))))
    floor, plot_width, plot_height = HEIGHT - BOTTOM, WIDTH - left - RIGHT, HEIGHT - TOP - BOTTOM

    def x(value: float) -> float:
        return left + plot_width * axis.position(value)

    def y(count: float) -> float:
        return floor - plot_height * count / top

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Histogram: {label} by {axis.label}">']
    for count in range(0, top + 1, spacing):
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - RIGHT}" y1="{y(count):.1f}" y2="{y(count):.1f}"/>')
        parts.append(f'<text x="{left - GAP}" y="{y(count) + 4:.1f}" text-anchor="end">{compact(count)}</text>')
    for count, start, end in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if count:
            size = f'x="{x(start):.1f}" width="{max(1, x(end) - x(start) - 1):.1f}"'
            # At least 1.5 units high: a bin with one image of a million must not look empty.
            height = max(1.5, floor - y(count))
            title = f"<title>{start:,.4g} to {end:,.4g}: {count:,}</title>"
            parts.append(f'<rect {size} y="{floor - height:.1f}" height="{height:.1f}">{title}</rect>')
    for tick, text in axis.ticks:
        parts.append(f'<line class="tick" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{floor}" y2="{floor + 4}"/>')
        middle = min(x(tick), WIDTH - label_width(text) / 2)  # the last label ends within the drawing
        parts.append(f'<text x="{middle:.1f}" y="{floor + 17}" text-anchor="middle">{text}</text>')
    parts.append(f'<text class="label" x="0" y="11">{label}</text>')
    parts.append(f'<text class="label" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{axis.label}</text>')
    if beyond := len(values) - int(counts.sum()):
        text = f"{beyond:,} beyond, up to {compact(float(np.max(values)))}"
        parts.append(f'<text class="label" x="{WIDTH - RIGHT}" y="11" text-anchor="end">{text}</text>')
    return "".join([*parts, "</svg>"])


def _round_step(at_least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is at least this."""
    power = 10 ** max(0, math.floor(math.log10(max(1.0, at_least))))
    return next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= at_least)
