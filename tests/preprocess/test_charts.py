from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdpnet.preprocess.inspection.charts import Axis, compact, histogram, linear_axis, ratio_axis

whole_numbers = st.lists(st.integers(1, 2**40), min_size=1, max_size=60).map(np.array)
ratios = st.lists(st.floats(1 / 65_535, 65_535), min_size=1, max_size=60).map(np.array)


def bars(svg: str) -> list[tuple[float, float, int]]:
    """(left edge, height, count) of each bar, the count as its title says it."""
    root = ElementTree.fromstring(svg)
    result = []
    for bar in root.iter("rect"):
        title = bar.findtext("title")
        assert title is not None
        count = int(title.rsplit(": ", 1)[1].replace(",", ""))
        result.append((float(bar.attrib["x"]), float(bar.attrib["height"]), count))
    return result


def beyond(svg: str) -> int:
    found = re.search(r">([\d,]+) beyond, up to", svg)
    return int(found[1].replace(",", "")) if found else 0


def check(values: np.ndarray, axis: Axis) -> None:
    svg = histogram(values, axis, "images")
    drawn = bars(svg)
    expected, _ = np.histogram(values, axis.edges)
    assert [count for _, _, count in drawn] == expected[expected > 0].tolist()
    assert sum(count for _, _, count in drawn) + beyond(svg) == len(values)
    assert beyond(svg) <= max(0, 0.005 * len(values) + 1)
    highest = max(drawn, key=lambda bar: bar[2])
    for _, height, count in drawn:
        assert height == pytest.approx(max(1.5, highest[1] * count / highest[2]), abs=0.11)
    assert 2 <= len(axis.edges) <= 60 and np.all(np.diff(axis.edges) > 0)
    places = [axis.position(tick) for tick, _ in axis.ticks]
    assert places and all(0 <= place <= 1 for place in places)
    # Labels are at most 7 characters of about 7 units, on a plot of about 358.
    assert all(second - first > 30 / 358 for first, second in pairwise(places))


@given(whole_numbers)
def test_every_whole_number_is_in_a_bar_or_announced(values: np.ndarray) -> None:
    check(values, linear_axis(values, "bytes"))


@given(ratios)
def test_every_ratio_is_in_a_bar(values: np.ndarray) -> None:
    axis = ratio_axis(values, "width : height")
    check(values, axis)
    assert beyond(histogram(values, axis, "images")) == 0
    assert axis.edges[::-1] == pytest.approx(1 / axis.edges), "symmetric about 1:1"


@pytest.mark.parametrize("count", [1, 9_999, 12_345, 123_456])
def test_the_labels_have_room(count: int) -> None:
    """The widest digit of DejaVu Sans, in which browsers without the page's other fonts show it, has 7.64 units."""
    root = ElementTree.fromstring(histogram(np.ones(count), linear_axis(np.ones(1), "pixels"), "images"))
    labels = [
        text for text in root.iter("text") if text.attrib.get("text-anchor") == "end" and "class" not in text.attrib
    ]
    assert len(labels) >= 2
    for label in labels:
        assert label.text and 7.64 * len(label.text.replace(",", "").replace(".", "")) <= float(label.attrib["x"])


def test_labels_of_far_ratios_neither_touch_nor_leave_the_drawing() -> None:
    values = np.array([1 / 60_000, 60_000])
    root = ElementTree.fromstring(histogram(values, ratio_axis(values, "width : height"), "images"))
    labels = sorted(
        (float(text.attrib["x"]), (len(text.text) - 1) * 7.64 + 4.05)
        for text in root.iter("text")
        if text.text and ":" in text.text and text.attrib.get("text-anchor") == "middle"
    )
    assert len(labels) >= 5
    for (x, width), (next_x, next_width) in pairwise(labels):
        assert x + width / 2 < next_x - next_width / 2
    assert labels[0][0] - labels[0][1] / 2 >= 0 and labels[-1][0] + labels[-1][1] / 2 <= 420


def test_a_long_tail_does_not_squeeze_the_rest() -> None:
    values = np.concatenate([np.arange(1, 1001), [50_000, 60_000]])
    axis = linear_axis(values, "bytes")
    assert axis.edges[-1] < 1_100
    assert "2 beyond, up to 60k" in histogram(values, axis, "images")


def test_nothing_to_count_is_an_empty_chart() -> None:
    for axis in (linear_axis(np.zeros(0), "pixels"), ratio_axis(np.zeros(0), "ratio")):
        assert bars(histogram(np.zeros(0), axis, "images")) == []


def test_small_whole_numbers_stand_above_their_tick() -> None:
    values = np.array([3, 4, 4, 6])
    axis = linear_axis(values, "images a class")
    drawn = bars(histogram(values, axis, "classes"))
    width = (420 - 46 - 16) / (len(axis.edges) - 1)
    for (left, _, _), value in zip(drawn, (3, 4, 6), strict=True):
        assert left + width / 2 == pytest.approx(46 + 358 * axis.position(value), abs=0.1)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (9_999, "9,999"), (10_000, "10k"), (12_500, "12.5k"), (3e6, "3M"), (2.5e9, "2.5G")],
)
def test_compact_numbers(value: float, text: str) -> None:
    assert compact(value) == text
