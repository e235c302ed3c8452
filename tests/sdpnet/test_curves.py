"""The drawing, read back from the SVG: its own tick labels say where values lie."""

from __future__ import annotations

import math
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpnet.reporting.curves import Curve, chart, number, percent

LEFT, RIGHT, COLUMNS = 46.0, 404.0, 179  # of the plot
HALF_A_DIGIT = 0.051  # coordinates have one digit behind the point


def draw(*curves: Curve, x_end: float, **options: Any) -> ElementTree.Element:
    return ElementTree.fromstring(chart(curves, label="loss", x_label="step", x_end=x_end, **options))


def places(svg: ElementTree.Element) -> list[tuple[float, float]]:
    """(value, height in the drawing) of each tick of the vertical axis."""
    lines = [float(line.attrib["y1"]) for line in svg.iter("line") if line.attrib["class"] == "grid"]
    texts = [
        text.text for text in svg.iter("text") if text.attrib.get("text-anchor") == "end" and "class" not in text.attrib
    ]
    return [(float(text or ""), y) for text, y in zip(texts, lines, strict=True)]


def value_at(svg: ElementTree.Element, y: float) -> float:
    (low, y_low), *_, (high, y_high) = places(svg)
    return low + (y - y_low) * (high - low) / (y_high - y_low)


def unit(svg: ElementTree.Element) -> float:
    """How much of the values one unit of the drawing is."""
    return abs(value_at(svg, 1.0) - value_at(svg, 0.0))


def points(path: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+),(-?[\d.]+)", path.attrib["d"])]


def of_class(svg: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [path for path in svg.iter("path") if name in path.attrib["class"].split()]


def test_a_short_curve_goes_through_its_points() -> None:
    x, y = np.array([1.0, 2, 4, 8]), np.array([7.0, 5.5, 6, 2])
    svg = draw(Curve("run", x, y, 255), x_end=10)
    (line,) = of_class(svg, "line")
    for (at, height), step, value in zip(points(line), x, y, strict=True):
        assert at == pytest.approx(LEFT + (RIGHT - LEFT) * step / 10, abs=HALF_A_DIGIT)
        assert value_at(svg, height) == pytest.approx(value, abs=2 * HALF_A_DIGIT * unit(svg))
    titles = [circle.findtext("title") for circle in svg.iter("circle")]
    assert titles == ["run: 7 at step 1", "run: 5.5 at step 2", "run: 6 at step 4", "run: 2 at step 8"]


def test_a_long_curve_loses_no_extreme() -> None:
    """Each column's band and mean, compared with numpy's on the column's own values."""
    rng = np.random.default_rng(0)
    x = np.arange(1, 20_001, dtype=np.float64)
    y = 5 + rng.normal(0, 0.3, len(x))
    y[[7, 9_000, 19_999]] = 11, -3, 12
    svg = draw(Curve("run", x, y, 255), x_end=20_000)
    (band,), (line,) = of_class(svg, "band"), of_class(svg, "line")
    outline, tolerance = points(band), 2 * HALF_A_DIGIT * unit(svg)
    upper, lower = outline[: 2 * COLUMNS], outline[2 * COLUMNS :][::-1]
    columns = np.minimum(np.floor(x * COLUMNS / 20_000), COLUMNS - 1)
    for column in range(COLUMNS):
        inside = y[columns == column]
        for side, expected in ((upper, inside.max()), (lower, inside.min())):
            (left, first), (right, second) = side[2 * column : 2 * column + 2]
            assert (left, right) == pytest.approx((LEFT + 2 * column, LEFT + 2 * column + 2), abs=HALF_A_DIGIT)
            assert first == second and value_at(svg, first) == pytest.approx(expected, abs=tolerance)
        assert value_at(svg, points(line)[column][1]) == pytest.approx(inside.mean(), abs=tolerance)


@pytest.mark.parametrize("length", [30, 300, 3_000])
def test_what_is_not_finite_is_a_gap_and_counted(length: int) -> None:
    x, y = np.arange(length, dtype=np.float64), np.ones(length)
    y[length // 3 : length // 2] = np.nan
    y[length // 2] = np.inf
    svg = draw(Curve("run", x, y, 255), x_end=length)
    lines = [points(line) for line in of_class(svg, "line")]
    assert len(lines) == 2
    lost = [points(mark)[0][0] for mark in of_class(svg, "lost")]
    assert lines[0][-1][0] < min(lost) + 2 and max(lost) - 2 < lines[1][0][0]
    assert any(text.text == f"{length // 2 - length // 3 + 1:,} values are not finite" for text in svg.iter("text"))


def test_a_value_between_two_gaps_is_seen() -> None:
    y = np.full(101, np.nan)
    y[50] = 3.0
    svg = draw(Curve("run", np.arange(101.0), y, 255), x_end=100)
    assert len(list(svg.iter("circle"))) == 1


def test_the_logarithmic_axis() -> None:
    y = np.array([1.0, 2, 1, 3, 1, 2, 5_000])
    curve = Curve("run", np.arange(7.0), y, 255)
    assert "logarithmic" not in chart([curve], label="norm", x_label="step", x_end=6)
    svg = draw(curve, x_end=6, may_be_log=True)
    heights = [math.log10(value) for value, _ in places(svg)]
    assert heights == [0, 1, 2, 3]
    distances = np.diff([y for _, y in places(svg)])
    assert distances == pytest.approx(distances[0], abs=0.11)
    with_zero = Curve("run", np.arange(7.0), y - 1, 255)
    assert "logarithmic" not in chart([with_zero], label="norm", x_label="step", x_end=6, may_be_log=True)


def test_names_are_text_and_dashes_are_dashes() -> None:
    svg = draw(Curve("<b>&", np.arange(3.0), np.arange(3.0), 40, dashed=True), x_end=2)
    assert svg.findtext("g/title") == "<b>&" and len(of_class(svg, "dashed")) == 1


finite_or_not = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(deadline=None, max_examples=200)
@given(st.lists(finite_or_not, max_size=60), st.integers(1, 12), st.booleans(), st.booleans())
def test_any_values_stay_inside_the_drawing(values: list[float], repeat: int, log: bool, zero: bool) -> None:
    y = np.repeat(np.array(values, np.float64), repeat)
    svg = draw(Curve("run", np.arange(1.0, len(y) + 1), y, 0), x_end=len(y) + 1, may_be_log=log, from_zero=zero)
    numbers = [n for path in svg.iter("path") for n in points(path)]
    numbers += [(float(circle.attrib["cx"]), float(circle.attrib["cy"])) for circle in svg.iter("circle")]
    assert all(LEFT - 0.1 <= x <= RIGHT + 0.1 and 15.9 <= y <= 162.1 for x, y in numbers)
    drawn = [*of_class(svg, "line"), *of_class(svg, "lost")]
    assert len(drawn) >= 1 or not values
    texts = [text.text for text in svg.iter("text") if "class" not in text.attrib]
    assert all(texts)


# Measured in DejaVu Sans at 12 px, in which a browser without the page's other fonts shows it.
@pytest.mark.parametrize(
    ("values", "label", "width"),
    [
        ([0.0, 0.0008], "0.0008", 41.99),
        ([0.0, 0.00002], "2e-05", 34.33),
        ([0.99990001, 0.99990002], "0.99990001", 72.53),
        ([-30_000.0, 5.0], "-30k", 26.55),
        ([1.0, 2.0], "1.2", 19.08),
    ],
)
def test_the_labels_have_room(values: list[float], label: str, width: float) -> None:
    svg = draw(Curve("run", np.arange(2.0), np.array(values), 255), x_end=1)
    ends = [float(text.attrib["x"]) for text in svg.iter("text") if text.text == label]
    assert ends and ends[0] >= width and ends[0] < width + 25
    (line,) = of_class(svg, "line")
    grid = next(line for line in svg.iter("line") if line.attrib["class"] == "grid")
    assert points(line)[0][0] == float(grid.attrib["x1"]) >= ends[0] + 6 and points(line)[-1][0] == RIGHT


def test_the_last_label_below_ends_within_the_drawing() -> None:
    svg = draw(Curve("run", np.array([0.0, 0.0005]), np.ones(2), 255), x_end=0.0005)
    (last,) = [text for text in svg.iter("text") if text.text == "0.0005"]
    assert float(last.attrib["x"]) + 41.99 / 2 <= 420


def test_ticks_that_lie_close_are_told_apart() -> None:
    y = np.array([6.907712, 6.907719, 6.907735])
    svg = draw(Curve("run", np.arange(3.0), y, 0), x_end=2)
    values = [value for value, _ in places(svg)]
    assert len(values) >= 3 and len(set(values)) == len(values)


def test_numbers() -> None:
    values = (0, 0.0005, 950, 5_000, 12_500, 3_000_000, -20_000, 7e9)
    assert [number(v) for v in values] == ["0", "0.0005", "950", "5000", "12.5k", "3M", "-20k", "7G"]
    assert [percent(v) for v in (0, 0.125, 1)] == ["0 %", "12.5 %", "100 %"]
