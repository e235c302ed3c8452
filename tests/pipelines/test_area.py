from __future__ import annotations

import numpy as np
import pytest

from sdpnet.pipelines.images.area import average, fit


@pytest.mark.parametrize("size", [(58, 43, 50, 37), (51, 50, 50, 49), (77, 200, 19, 50), (9, 9, 9, 9), (99, 3, 50, 1)])
def test_exact_area_averages(size):
    height, width, new_height, new_width = size
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    # Repeat each pixel as often as there are output pixels, then average whole groups: in integers.
    total = pixels.astype(np.int64).repeat(new_height, 0).reshape(new_height, height, width, 3).sum(1)
    total = total.repeat(new_width, 1).reshape(new_height, new_width, width, 3).sum(2)
    expected = (2 * total + height * width) // (2 * height * width)
    difference = np.abs(average(pixels, new_height, new_width) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.001, "float32 rounds half-way cases only"


def test_a_plain_image_stays_plain():
    for value in (0, 1, 127, 255):
        assert (average(np.full((70, 91, 3), value, np.uint8), 41, 53) == value).all()


@pytest.mark.parametrize(
    ("size", "max_side", "expected"),
    [
        ((500, 375), 500, (500, 375)),
        ((375, 500), 0, (375, 500)),
        ((1000, 333), 500, (500, 167)),
        ((333, 1001), 500, (166, 500)),
        ((65_500, 1), 500, (500, 1)),
    ],
)
def test_fit(size, max_side, expected):
    assert fit(*size, max_side) == expected
