"""Line charts of training curves, for Plotly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sdpnet.pipelines.pages.chart import Chart, layout, plotly_text

__all__ = ["Curve", "chart", "number", "percent"]

COLUMNS: Final = 600  # a long curve is reduced to so many columns with a lowest, a mean and a highest value
DOTS_UP_TO: Final = 40  # curves of more points are drawn without dots
LOG_FROM: Final = 30.0  # the ratio of highest value to median above which the vertical axis may be logarithmic
MARGIN: Final = 1.01  # the length of the horizontal axis relative to the data, so that the last dot is not cut
FRACTIONS: Final = (0.25, 0.5, 0.75, 1.0)  # the positions on the horizontal axis for which the table has values


@dataclass(frozen=True, eq=False)
class Curve:
    """One line of a chart.

    Attributes:
        name: the label of a point under the mouse.
        x: float64 (n,), finite and rising.
        y: float64 (n,). A value that is not finite is a gap in the line, with a mark at the top of the chart.
        colour: "#rrggbb".
        dashed: whether the line is dashed.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str
    dashed: bool = False


def number(value: float) -> str:
    """A number in few characters: 0.0005, 950, 12.5k, 3M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 10_000):
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def percent(value: float) -> str:
    """A fraction as a percentage."""
    return f"{100 * value:.4g} %"


def chart(
    curves: Sequence[Curve],
    *,
    title: str,
    label: str,
    x_label: str,
    x_end: float,
    text: Callable[[float], str] = number,
    from_zero: bool = False,
    may_be_log: bool = False,
) -> Chart:
    """Draws the curves as one chart.

    A curve with more than two points in each column of the plot is drawn as a band from the lowest to the highest value
    of each column, and a line of the means. In this way, no extreme value is lost.

    Args:
        label: the label of the vertical axis.
        x_end: the end of the horizontal axis, above 0. The axis starts at 0.
        text: formats a value for the table. With `percent` the vertical axis is in percent, too.
        from_zero: whether the vertical axis includes 0.
        may_be_log: whether the vertical axis is logarithmic if all values are positive and the highest one is far above
            their median.
    """
    finite = np.concatenate([np.zeros(0), *(curve.y[np.isfinite(curve.y)] for curve in curves)])
    log = bool(
        may_be_log
        and not from_zero
        and len(finite)
        and finite.min() > 0
        and finite.max() > LOG_FROM * float(np.median(finite))
    )
    lost = sum(int(np.count_nonzero(~np.isfinite(curve.y))) for curve in curves)
    y_axis: dict[str, Any] = {"title": {"text": label + (", logarithmic" if log else "")}, "hoverformat": ".5~g"}
    if text is percent:
        y_axis |= {"tickformat": ".4~%", "hoverformat": ".4~%"}
    if len(finite) and np.abs(finite).max() < 0.01:
        y_axis |= {"exponentformat": "power"}  # by default, Plotly would write small learning rates with the prefix µ
    if log:
        y_axis |= {"type": "log"}
    elif from_zero:
        y_axis |= {"rangemode": "tozero"}
    figure = {
        "data": [trace for curve in curves for trace in _traces(curve, x_end)],
        "layout": layout(
            {"title": {"text": x_label}, "range": [0, MARGIN * x_end], "hoverformat": ".6~g"},
            y_axis,
            hovermode="x",
            yaxis2={"overlaying": "y", "range": [0, 1], "fixedrange": True, "visible": False},
        ),
    }
    return Chart(
        title,
        f"Curves: {label} by {x_label}",
        figure,
        ["", *(f"{x_label} {number(part * x_end)}" for part in FRACTIONS), "lowest", "highest"],
        [[curve.name, *_values(curve, x_end, text)] for curve in curves],
        "" if not lost else "1 value is not finite." if lost == 1 else f"{lost:,} values are not finite.",
    )


def _traces(curve: Curve, x_end: float) -> list[dict[str, Any]]:
    """Plotly's traces of a curve: its band, if it has one, its line, and marks where it is not finite."""
    columns = np.minimum((curve.x / x_end * COLUMNS).astype(np.int64), COLUMNS - 1)
    x, y, ok = curve.x, curve.y, np.isfinite(curve.y)
    marks = (np.unique(columns[~ok]) + 0.5) * x_end / COLUMNS
    many = len(ok) > max(DOTS_UP_TO, 2 * len(np.unique(columns)))
    traces: list[dict[str, Any]] = []
    shared: dict[str, Any] = {"name": plotly_text(curve.name), "mode": "lines"}
    if many:
        occupied, low, y, high = _by_column(columns, curve.y)
        x, ok = (occupied + 0.5) * x_end / COLUMNS, np.isfinite(y)
        traces.append(_band(x, low, high, ok, curve.colour))
        shared |= {
            "customdata": [[f"{a:.4g}", f"{b:.4g}"] for a, b in zip(low, high, strict=True)],
            "hovertemplate": "%{y} (%{customdata[0]} to %{customdata[1]})",
        }
    alone = ok & ~np.r_[False, ok[:-1]] & ~np.r_[ok[1:], False]  # a point without neighbours has no line
    dots = ok if len(ok) <= DOTS_UP_TO else alone
    if dots.any():
        shared |= {"mode": "lines+markers", "marker": {"color": curve.colour, "size": np.where(dots, 5, 0).tolist()}}
    line = {"color": curve.colour, "width": 1.5, "dash": "dash" if curve.dashed else "solid"}
    traces.append({"x": _numbers(x), "y": _numbers(y), "line": line, **shared})
    if len(marks):
        traces.append(
            {
                "x": _numbers(marks),
                "y": [0.97] * len(marks),
                "yaxis": "y2",
                "mode": "markers",
                "name": shared["name"],
                "hovertemplate": "not finite",
                "marker": {"color": curve.colour, "symbol": "line-ns-open", "size": 7},
            }
        )
    return traces


def _by_column(columns: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The columns that have points, and the lowest, mean and highest finite value of each (NaN if there is none)."""
    occupied, starts = np.unique(columns, return_index=True)
    ok = np.isfinite(values)
    counts = np.add.reduceat(ok.astype(np.int64), starts)
    low = np.minimum.reduceat(np.where(ok, values, np.inf), starts)
    high = np.maximum.reduceat(np.where(ok, values, -np.inf), starts)
    mean = np.add.reduceat(np.where(ok, values, 0), starts) / np.maximum(counts, 1)
    low, mean, high = (np.where(counts, statistic, np.nan) for statistic in (low, mean, high))
    return occupied, low, mean, high


def _band(x: np.ndarray, low: np.ndarray, high: np.ndarray, ok: np.ndarray, colour: str) -> dict[str, Any]:
    """A trace of closed outlines from the lowest to the highest values, one for each stretch without a gap."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    changes = np.flatnonzero(np.diff(np.r_[False, ok, False].astype(np.int8)))
    for first, last in zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True):
        part = slice(first, last)
        xs += [*_numbers(x[part]), *_numbers(x[part][::-1]), None]
        ys += [*_numbers(high[part]), *_numbers(low[part][::-1]), None]
    outline = {"mode": "lines", "line": {"width": 0, "color": colour}, "fill": "toself", "fillcolor": f"{colour}40"}
    return {"x": xs, "y": ys, "hoverinfo": "skip", **outline}


def _values(curve: Curve, x_end: float, text: Callable[[float], str]) -> list[str]:
    """The row of the table: the last value before each of `FRACTIONS`, the lowest value and the highest value."""
    ends = np.searchsorted(curve.x, np.array(FRACTIONS) * x_end, side="right")
    values = [float(curve.y[end - 1]) if end else None for end in ends.tolist()]
    finite = curve.y[np.isfinite(curve.y)].tolist()
    return [
        "-" if value is None else text(value)
        for value in (*values, min(finite, default=None), max(finite, default=None))
    ]


def _numbers(values: np.ndarray) -> list[float | None]:
    """The values for JSON, with seven digits, as float32 has; None is a gap."""
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in values.tolist()]
