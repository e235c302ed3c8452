from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sdpnet.pipelines.pages.chart import Chart
from sdpnet.preprocess.inspection.charts import Axis, compact, histogram, linear_axis, ratio_axis

whole_numbers = st.lists(st.integers(1, 2**40), min_size=1, max_size=60).map(np.array)
ratios = st.lists(st.floats(1 / 65_535, 65_535), min_size=1, max_size=60).map(np.array)


def draw(values: np.ndarray, axis: Axis, label: str = "images") -> Chart:
    return histogram(values, axis, label, "title")


def bars(chart: Chart) -> Any:
    """The bars as they arrive in the browser."""
    (trace,) = json.loads(json.dumps(chart.figure, allow_nan=False))["data"]
    return trace


def beyond(chart: Chart) -> int:
    return int(chart.note.split(" beyond, up to")[0].replace(",", "")) if chart.note else 0


def check(values: np.ndarray, axis: Axis) -> None:
    chart = draw(values, axis)
    drawn = bars(chart)
    expected, _ = np.histogram(values, axis.edges)
    assert drawn["y"] == expected[expected > 0].tolist()
    assert [row[1] for row in chart.rows] == [f"{count:,}" for count in drawn["y"]]
    assert sum(drawn["y"]) + beyond(chart) == len(values)
    assert beyond(chart) <= max(0, 0.005 * len(values) + 1)
    places = axis.position(axis.edges)[np.flatnonzero(expected)[:, None] + [0, 1]]
    assert np.array(drawn["x"]) - np.array(drawn["width"]) / 2 == pytest.approx(places[:, 0], rel=1e-9)
    assert np.array(drawn["x"]) + np.array(drawn["width"]) / 2 == pytest.approx(places[:, 1], rel=1e-9)
    assert 2 <= len(axis.edges) <= 60 and np.all(np.diff(axis.edges) > 0)
    low, high = chart.figure["layout"]["xaxis"]["range"]
    assert (low, high) == (axis.position(axis.edges[0]), axis.position(axis.edges[-1]))
    assert all(low <= axis.position(tick) <= high for tick, _ in axis.ticks)


@settings(deadline=None)
@given(whole_numbers)
def test_every_whole_number_is_in_a_bar_or_announced(values: np.ndarray) -> None:
    check(values, linear_axis(values, "bytes"))


@settings(deadline=None)
@example(np.array([0.1875]))  # 3:2 and 2:1 would be too near
@given(ratios)
def test_every_ratio_is_in_a_bar(values: np.ndarray) -> None:
    axis = ratio_axis(values, "width : height")
    check(values, axis)
    assert beyond(draw(values, axis)) == 0
    assert axis.edges[::-1] == pytest.approx(1 / axis.edges), "symmetric about 1:1"
    # Labels are at most 7 characters of about 7 units, on a plot of about 358.
    places = [(axis.position(tick) - axis.position(axis.edges[0])) for tick, _ in axis.ticks]
    whole = axis.position(axis.edges[-1]) - axis.position(axis.edges[0])
    assert len(places) >= 3 and all((second - first) / whole > 30 / 358 for first, second in pairwise(places))
    assert [text for _, text in axis.ticks if text == "1:1"] == ["1:1"]


def test_a_bar_says_its_range_and_its_count() -> None:
    chart = draw(np.array([3, 4, 4, 6]), linear_axis(np.array([3, 4, 4, 6]), "pixels"))
    assert bars(chart)["text"] == ["2.5 to 3.5: 1", "3.5 to 4.5: 2", "5.5 to 6.5: 1"]
    assert bars(chart)["hovertemplate"] == "%{text}<extra></extra>"
    assert chart.head == ["pixels", "images"] and chart.rows[1] == ["3.5 to 4.5", "2"]
    figure = plotly.graph_objects.Figure(chart.figure)  # Plotly knows every key in it
    assert figure.layout.xaxis.title.text == "pixels" and figure.layout.yaxis.title.text == "images"


def test_a_bar_is_seen_however_low() -> None:
    values = np.r_[np.full(1_000_000, 5), 9]
    trace = bars(draw(values, linear_axis(values, "pixels")))
    assert trace["y"] == [1_000_000, 1] and trace["marker"]["line"] == {"color": trace["marker"]["color"], "width": 1}


def test_a_long_tail_does_not_squeeze_the_rest() -> None:
    values = np.concatenate([np.arange(1, 1001), [50_000, 60_000]])
    axis = linear_axis(values, "bytes")
    assert axis.edges[-1] < 1_100
    assert draw(values, axis).note == "2 beyond, up to 60k"


def test_nothing_to_count_is_an_empty_chart() -> None:
    for axis in (linear_axis(np.zeros(0), "pixels"), ratio_axis(np.zeros(0), "ratio")):
        assert bars(draw(np.zeros(0), axis))["x"] == [] and draw(np.zeros(0), axis).rows == []


def test_small_whole_numbers_stand_above_their_tick() -> None:
    values = np.array([3, 4, 4, 6])
    assert bars(draw(values, linear_axis(values, "images a class"), "classes"))["x"] == [3, 4, 6]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (9_999, "9,999"), (10_000, "10k"), (12_500, "12.5k"), (3e6, "3M"), (2.5e9, "2.5G")],
)
def test_compact_numbers(value: float, text: str) -> None:
    assert compact(value) == text
