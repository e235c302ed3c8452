"""`pipelines/native/resize.h` against float64, Pillow and torchvision."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from decoder_parts import CropLibrary
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jpeg_files import make_image
from PIL import Image
from torchvision.transforms.v2.functional import resize

SIDES = st.integers(1, 90)


def weights(inputs: int, outputs: int, start: float, length: float) -> np.ndarray:
    """float64 (outputs, inputs): a triangle as wide as the reduction, cut at the ends and normalised."""
    scale = length / outputs
    reach = max(scale, 1)
    centres = start + (np.arange(outputs) + 0.5) * scale
    triangle = 1 - np.abs(np.arange(inputs) + 0.5 - centres[:, None]) / reach
    triangle = np.maximum(triangle, 0)
    return triangle / triangle.sum(axis=1, keepdims=True)


# A sum of at most 16 products of a row is rounded product by product, to 1/128 of a level; the result to a level.
ROUNDINGS = 16 * 0.5 / 128 + 0.5 + 1e-9


def fixed_point(weights: np.ndarray, bits: int) -> np.ndarray:
    """The nearest multiples of 1 / 2^bits, of which the largest of each output takes the rest, so that the sum is 1.

    These errors grow with the number of weights: to 0.001 in 14 bits and 90 of them. 1.0 itself is 32767 in 15 bits.
    """
    units = np.floor(weights * 2**bits + 0.5)
    rest = 2**bits - units.sum(axis=1)
    units[np.arange(len(units)), units.argmax(axis=1)] += rest
    assert np.abs(rest).max() <= 0.5 * weights.shape[1]
    return np.minimum(units, 32767) / 2**bits


def exact(pixels: np.ndarray, box: tuple[float, float, float, float], out: tuple[int, int]) -> np.ndarray:
    rows = fixed_point(weights(pixels.shape[0], out[0], box[0], box[2]), 15)
    columns = fixed_point(weights(pixels.shape[1], out[1], box[1], box[3]), 14)
    by_row = np.einsum("yv,vuc->yuc", rows, pixels.astype(np.float64))
    return np.einsum("xu,yuc->yxc", columns, by_row)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 99), SIDES, SIDES, SIDES, SIDES, st.booleans())
@example(0, 1, 1, 5, 5, True)
@example(79, 29, 79, 15, 1, False)  # 79 weights
@example(0, 1, 90, 3, 2, False)
@example(0, 90, 1, 1, 1, False)
@example(0, 90, 90, 4, 8, False)
def test_any_size(crop_library: CropLibrary, seed, height, width, out_height, out_width, flip):
    pixels = make_image(seed, height, width)
    found = crop_library.resize(pixels, (out_height, out_width), flip=flip)
    expected = exact(pixels, (0, 0, height, width), (out_height, out_width))
    assert np.abs(found - (expected[:, ::-1] if flip else expected)).max() <= ROUNDINGS
    assert np.array_equal(found, crop_library.resize(pixels, (out_height, out_width), flip=flip, avx2=False))


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(0, 99), SIDES, SIDES, SIDES)
def test_a_fractional_box(crop_library, data, seed, height, width, out):
    """As DCT scaling leaves them: the pixels hold the box, and not one row or column more."""
    top, left = (data.draw(st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75])) for _ in range(2))
    bottom, right = (data.draw(st.sampled_from([0.0, 0.125, 0.5])) for _ in range(2))
    box = (top, left, height - top - bottom, width - left - right)
    pixels = make_image(seed, height, width)
    if min(box[2:]) <= 0:
        return
    found = crop_library.resize(pixels, (out, out), box)
    assert np.abs(found - exact(pixels, box, (out, out))).max() <= ROUNDINGS
    assert np.array_equal(found, crop_library.resize(pixels, (out, out), box, avx2=False))


@pytest.mark.parametrize("size", [(375, 500), (224, 224), (100, 80), (1, 1), (500, 3)])
def test_like_pillow_and_torchvision(crop_library, size):
    pixels = make_image(5, *size)
    found = crop_library.resize(pixels, (224, 224)).astype(int)
    pillow = np.asarray(Image.fromarray(pixels).resize((224, 224), Image.Resampling.BILINEAR), int)
    tensor = resize(torch.from_numpy(pixels).permute(2, 0, 1), [224, 224], antialias=True)
    for other in (pillow, tensor.permute(1, 2, 0).numpy().astype(int)):
        assert np.abs(found - other).max() <= 1 and np.abs(found - other).mean() < 0.3


def test_the_same_size_is_the_same_image(crop_library):
    for size in ((37, 41), (1, 1), (224, 224)):
        pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
        assert np.array_equal(crop_library.resize(pixels, size), pixels)
        assert np.array_equal(crop_library.resize(pixels, size, flip=True), pixels[:, ::-1])


def test_extremes_do_not_overflow(crop_library):
    for value in (0, 255):
        pixels = np.full((333, 77, 3), value, np.uint8)
        for out in ((224, 224), (10, 400), (334, 76), (1, 1)):
            assert (crop_library.resize(pixels, out) == value).all()


def test_nothing_beyond_the_output(crop_library):
    pixels = make_image(2, 50, 60)
    for out in ((7, 5), (224, 223), (1, 1), (3, 4)):
        room = np.full(out[0] * out[1] * 3 + 64, 77, np.uint8)
        box = (ctypes.c_double * 4)(0, 0, 50, 60)
        crop_library.library.crop_resize(pixels.ctypes.data, 50, 60, box, room.ctypes.data, *out, False, True)
        assert (room[-64:] == 77).all()
