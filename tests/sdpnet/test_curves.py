"""The figures that Plotly draws, read back: what is in them against numpy on the curve's own values."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import plotly.graph_objects
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpnet.pipelines.pages.chart import Chart
from sdpnet.reporting.curves import COLUMNS, Curve, chart, number, percent

COLOUR = "#1f77b4"


def draw(*curves: Curve, x_end: float, **options: Any) -> Chart:
    return chart(curves, title="Loss", label="loss", x_label="step", x_end=x_end, **options)


def figure(*curves: Curve, x_end: float, **options: Any) -> Any:
    """The figure as it arrives in the browser. Plotly itself says that it knows every key in it."""
    found = json.loads(json.dumps(draw(*curves, x_end=x_end, **options).figure, allow_nan=False))
    plotly.graph_objects.Figure(found)
    return found


def lines(found: Any) -> list[Any]:
    return [trace for trace in found["data"] if trace["mode"].startswith("lines") and "fill" not in trace]


def bands(found: Any) -> list[Any]:
    return [trace for trace in found["data"] if "fill" in trace]


def lost(found: Any) -> list[Any]:
    return [trace for trace in found["data"] if trace["mode"] == "markers"]


def parts(values: list[Any]) -> list[list[Any]]:
    """The stretches between gaps."""
    found: list[list[Any]] = [[]]
    for value in values:
        if value is None:
            found.append([])
        else:
            found[-1].append(value)
    return [part for part in found if part]


def test_a_short_curve_goes_through_its_points() -> None:
    x, y = np.array([1.0, 2, 4, 8]), np.array([7.0, 5.5, 6, 2])
    drawn = figure(Curve("run", x, y, COLOUR), x_end=10)
    (line,) = lines(drawn)
    assert line["x"] == x.tolist() and line["y"] == y.tolist() and line["name"] == "run"
    assert line["line"]["color"] == COLOUR and line["marker"]["size"] == [5] * 4, "its points are seen"
    assert drawn["layout"]["xaxis"]["range"] == [0, 10.1] and not bands(drawn) and not lost(drawn)


def test_a_long_curve_loses_no_extreme() -> None:
    """Each column's band and mean, compared with numpy's on the column's own values."""
    rng = np.random.default_rng(0)
    x = np.arange(1, 20_001, dtype=np.float64)
    y = 5 + rng.normal(0, 0.3, len(x))
    y[[7, 9_000, 19_999]] = 11, -3, 12
    drawn = figure(Curve("run", x, y, COLOUR), x_end=20_000)
    (band,), (line,) = bands(drawn), lines(drawn)
    (outline_x,), (outline_y,) = parts(band["x"]), parts(band["y"])
    upper, lower = outline_y[:COLUMNS], outline_y[COLUMNS:][::-1]
    columns = np.minimum(np.floor(x / 20_000 * COLUMNS), COLUMNS - 1)
    middles = ((np.arange(COLUMNS) + 0.5) * 20_000 / COLUMNS).tolist()
    assert line["x"] == pytest.approx(middles, rel=1e-6) and outline_x == line["x"] + line["x"][::-1]
    for column in range(COLUMNS):
        inside = y[columns == column]
        assert upper[column] == pytest.approx(inside.max(), rel=1e-6)
        assert lower[column] == pytest.approx(inside.min(), rel=1e-6)
        assert line["y"][column] == pytest.approx(inside.mean(), rel=1e-6)
        assert line["customdata"][column] == [f"{inside.min():.4g}", f"{inside.max():.4g}"]


@pytest.mark.parametrize("length", [30, 300, 3_000])
def test_what_is_not_finite_is_a_gap_and_counted(length: int) -> None:
    x, y = np.arange(length, dtype=np.float64), np.ones(length)
    y[length // 3 : length // 2] = np.nan
    y[length // 2] = np.inf
    curve = Curve("run", x, y, COLOUR)
    drawn = figure(curve, x_end=length)
    (line,) = lines(drawn)
    assert len(parts(line["y"])) == 2
    (marks,) = lost(drawn)
    gap = [x for x, y in zip(line["x"], line["y"], strict=True) if y is None]
    column = length / COLUMNS
    assert min(gap) - column <= min(marks["x"]) and max(marks["x"]) <= max(gap) + column
    assert marks["yaxis"] == "y2" and all(0.9 < place < 1 for place in marks["y"]), "at the top"
    assert draw(curve, x_end=length).note == f"{length // 2 - length // 3 + 1:,} values are not finite."
    assert all(len(parts(band["x"])) == 2 for band in bands(drawn))


def test_a_value_between_two_gaps_is_seen() -> None:
    y = np.full(101, np.nan)
    y[50] = 3.0
    (line,) = lines(figure(Curve("run", np.arange(101.0), y, COLOUR), x_end=100))
    assert line["mode"] == "lines+markers"
    assert [size for size, value in zip(line["marker"]["size"], line["y"], strict=True) if value == 3] == [5]
    assert sum(line["marker"]["size"]) == 5


def test_the_logarithmic_axis() -> None:
    y = np.array([1.0, 2, 1, 3, 1, 2, 5_000])
    curve = Curve("run", np.arange(7.0), y, COLOUR)

    def axis(*curves: Curve, **options: Any) -> Any:
        return figure(*curves, x_end=6, **options)["layout"]["yaxis"]

    assert "type" not in axis(curve) and "logarithmic" not in axis(curve)["title"]["text"]
    assert axis(curve, may_be_log=True)["type"] == "log"
    assert axis(curve, may_be_log=True)["title"]["text"] == "loss, logarithmic"
    with_zero = Curve("run", np.arange(7.0), y - 1, COLOUR)
    assert "type" not in axis(with_zero, may_be_log=True)
    assert axis(curve, from_zero=True)["rangemode"] == "tozero"


def test_names_are_text_and_dashes_are_dashes() -> None:
    curve = Curve("<b>&", np.arange(3.0), np.arange(3.0), COLOUR, dashed=True)
    (line,) = lines(figure(curve, x_end=2))
    assert line["name"] == "&lt;b&gt;&amp;", "Plotly reads some HTML in names"
    assert line["line"]["dash"] == "dash" and draw(curve, x_end=2).rows[0][0] == "<b>&"


finite_or_not = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(deadline=None, max_examples=100)
@given(st.lists(finite_or_not, max_size=60), st.integers(1, 12), st.booleans(), st.booleans())
def test_any_values_are_drawn_or_marked(values: list[float], repeat: int, log: bool, zero: bool) -> None:
    y = np.repeat(np.array(values, np.float64), repeat)
    curve = Curve("run", np.arange(1.0, len(y) + 1), y, COLOUR)
    found = json.loads(json.dumps(draw(curve, x_end=len(y) + 1, may_be_log=log, from_zero=zero).figure))
    finite = y[np.isfinite(y)]
    for trace in found["data"]:
        assert len(trace["x"]) == len(trace["y"])
        assert all(0 <= x <= len(y) + 1 for part in parts(trace["x"]) for x in part)
    drawn = [
        value for trace in found["data"] if trace["mode"] != "markers" for value in trace["y"] if value is not None
    ]
    if len(finite):
        assert (min(drawn), max(drawn)) == pytest.approx((finite.min(), finite.max()), rel=1e-6)
    assert bool(lost(found)) == (len(finite) < len(y))


def test_the_table_has_the_values_at_each_quarter() -> None:
    y = np.array([9.0, 7, 8, 5, math.nan])
    drawn = draw(Curve("run", np.array([10.0, 20, 30, 35, 38]), y, COLOUR), x_end=40)
    assert drawn.head == ["", "step 10", "step 20", "step 30", "step 40", "lowest", "highest"]
    assert drawn.rows == [["run", "9", "7", "8", "nan", "5", "9"]]
    late = Curve("run", np.array([30.0]), np.array([0.5]), COLOUR)
    assert draw(late, x_end=40, text=percent).rows == [["run", "-", "-", "50 %", "50 %", "50 %", "50 %"]]


def test_numbers() -> None:
    values = (0, 0.0005, 950, 5_000, 12_500, 3_000_000, -20_000, 7e9)
    assert [number(v) for v in values] == ["0", "0.0005", "950", "5000", "12.5k", "3M", "-20k", "7G"]
    assert [percent(v) for v in (0, 0.125, 1)] == ["0 %", "12.5 %", "100 %"]
