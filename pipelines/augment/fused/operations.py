"""Computes a pixel's levels after the operations on its image, in Triton; used by all kernels of the device stage.

    row of draws, (x, y) --(backwards through the columns)--> uint8 pixels --(forwards through the operations)--> levels

A column of draws holds the operation that each sample drew at one position of its sequence. Geometric operations move
to the nearest pixel, so each output pixel has exactly one source pixel, however many of them follow each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sdpnet.pipelines.augment.fused.launch import COLUMN, FIELDS
from sdpnet.pipelines.augment.reference.filters import GREY_ADDEND, GREY_SHIFT, GREY_WEIGHTS
from sdpnet.pipelines.planning.policies import Operation

__all__ = ["blend_level", "clamp_level", "grey_level", "load_float", "operate", "place_of", "source_of", "to_even"]

_FIELDS, _COLUMN = tl.constexpr(FIELDS), tl.constexpr(COLUMN)
_GREY_RED, _GREY_GREEN, _GREY_BLUE = (tl.constexpr(weight) for weight in GREY_WEIGHTS)
_GREY_ADDEND, _GREY_SHIFT = tl.constexpr(GREY_ADDEND), tl.constexpr(GREY_SHIFT)
_FIRST_GEOMETRIC, _LAST_GEOMETRIC = tl.constexpr(int(Operation.SHEAR_X)), tl.constexpr(int(Operation.ROTATE))
_BRIGHTNESS, _COLOUR = tl.constexpr(int(Operation.BRIGHTNESS)), tl.constexpr(int(Operation.COLOUR))
_POSTERIZE, _SOLARIZE = tl.constexpr(int(Operation.POSTERIZE)), tl.constexpr(int(Operation.SOLARIZE))
_SOLARIZE_ADD, _INVERT = tl.constexpr(int(Operation.SOLARIZE_ADD)), tl.constexpr(int(Operation.INVERT))
_CONTRAST, _GREYSCALE = tl.constexpr(int(Operation.CONTRAST)), tl.constexpr(int(Operation.GREYSCALE))
_AUTOCONTRAST, _EQUALIZE = tl.constexpr(int(Operation.AUTOCONTRAST)), tl.constexpr(int(Operation.EQUALIZE))


@triton.jit
def load_float(row):
    """A float32 value that the int32 row of draws stores bit by bit."""
    return tl.load(row).to(tl.float32, bitcast=True)


@triton.jit
def to_even(x):
    """The whole number nearest to x, ties to even, for |x| < 2^22."""
    # The sum lies between 2^23 and 2^24, where float32 holds whole numbers only: the addition itself rounds.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def place_of(start, width, BLOCK: tl.constexpr):
    """The coordinates (column, row) of BLOCK pixels that follow each other, from pixel `start` of an image on."""
    # One whole division of integers for all pixels. The others have small numerators, so that a product with the
    # rounded reciprocal, from the middle of a pixel, is never on the wrong side of a whole number: its error is below
    # 2^-21 of it, and it has a distance of 0.5 / width or more.
    row = start // width
    column = start - row * width + tl.arange(0, BLOCK)
    below = ((column.to(tl.float32) + 0.5) * (1.0 / width)).to(tl.int32)
    return column - below * width, row + below


@triton.jit
def clamp_level(x):
    """Float levels limited to [0, 255] and truncated to int32."""
    return tl.minimum(tl.maximum(x, 0.0), 255.0).to(tl.int32)


@triton.jit
def grey_level(r, g, b):
    """Grey levels int32, in integers, so that every device gives the same ones (see `reference.filters`)."""
    return (r * _GREY_RED + g * _GREY_GREEN + b * _GREY_BLUE + _GREY_ADDEND) >> _GREY_SHIFT


@triton.jit
def blend_level(v, grey, factor, weight):
    """Levels `v` times `factor` plus `grey` times `weight`; each product and the sum are rounded separately."""
    return clamp_level(v.to(tl.float32) * factor + grey * weight)


@triton.jit
def source_of(column, x, y, height, width):
    """The source coordinates (column, row), float32, of the pixels at (x, y) under one column's geometric operation."""
    from_x = x.to(tl.float32) - (width - 1) * 0.5
    from_y = y.to(tl.float32) - (height - 1) * 0.5
    to_x = from_x * load_float(column + 3) + from_y * load_float(column + 4) + load_float(column + 5)
    to_y = from_x * load_float(column + 6) + from_y * load_float(column + 7) + load_float(column + 8)
    return to_x, to_y


@triton.jit
def _backwards(row, x, y, first, end, height, width, COLUMNS: tl.constexpr):
    """Follows the pixels at (x, y) back from after column `end` - 1 to before column `first`.

    Returns:
        their source coordinates x and y, and the last column that filled the pixel from outside the image, or -1.
    """
    fill_column = tl.zeros_like(x) - 1
    for i in tl.static_range(COLUMNS):
        column = row + _FIELDS + (COLUMNS - 1 - i) * _COLUMN
        operation = tl.load(column)
        within = (COLUMNS - 1 - i >= first) & (COLUMNS - 1 - i < end)
        if within & (operation >= _FIRST_GEOMETRIC) & (operation <= _LAST_GEOMETRIC):
            to_x, to_y = source_of(column, x, y, height, width)
            to_x, to_y = to_even(to_x), to_even(to_y)
            outside = (to_x < 0) | (to_x >= width) | (to_y < 0) | (to_y >= height)
            fill_column = tl.where((fill_column < 0) & outside, COLUMNS - 1 - i, fill_column)
            x = tl.where(outside, 0, to_x).to(tl.int32)
            y = tl.where(outside, 0, to_y).to(tl.int32)
    return x, y, fill_column


@triton.jit
def _read(images, prepared, slot, sample, x, y, wanted, height, width):
    """Levels int32 (r, g, b) at (x, y), from `prepared` if there is a slot and from `images` otherwise."""
    # Offsets of samples and slots are int64: a large batch has more than 2^31 bytes.
    plane = height * width
    if slot >= 0:
        planar = prepared + slot.to(tl.int64) * 3 * plane + y * width + x
        r = tl.load(planar, mask=wanted, other=0).to(tl.int32)
        g = tl.load(planar + plane, mask=wanted, other=0).to(tl.int32)
        b = tl.load(planar + 2 * plane, mask=wanted, other=0).to(tl.int32)
    else:
        pixel = images + sample.to(tl.int64) * 3 * plane + (y * width + x) * 3
        r = tl.load(pixel, mask=wanted, other=0).to(tl.int32)
        g = tl.load(pixel + 1, mask=wanted, other=0).to(tl.int32)
        b = tl.load(pixel + 2, mask=wanted, other=0).to(tl.int32)
    return r, g, b


@triton.jit
def _forwards(row, tables, sample, r, g, b, fill_column, first, end, fill, COLUMNS: tl.constexpr):
    """Applies the operations of columns `first` to `end` - 1 to levels.

    A pixel that column `fill_column` filled begins with the fill's levels after that column.
    """
    for k in tl.static_range(COLUMNS):
        operation = tl.where((k >= first) & (k < end), tl.load(row + _FIELDS + k * _COLUMN), 0)
        magnitude = load_float(row + _FIELDS + k * _COLUMN + 1)
        if operation >= _BRIGHTNESS:  # neither identity nor geometric: one comparison instead of nine
            if operation == _BRIGHTNESS:
                r = clamp_level(r.to(tl.float32) * (1.0 + magnitude))
                g = clamp_level(g.to(tl.float32) * (1.0 + magnitude))
                b = clamp_level(b.to(tl.float32) * (1.0 + magnitude))
            if operation == _COLOUR:
                grey = grey_level(r, g, b).to(tl.float32)
                r = blend_level(r, grey, 1.0 + magnitude, -magnitude)
                g = blend_level(g, grey, 1.0 + magnitude, -magnitude)
                b = blend_level(b, grey, 1.0 + magnitude, -magnitude)
            if operation == _POSTERIZE:
                kept = 256 - (1 << (8 - magnitude.to(tl.int32)))
                r, g, b = r & kept, g & kept, b & kept
            if operation == _SOLARIZE:
                r = tl.where(r >= magnitude, 255 - r, r)
                g = tl.where(g >= magnitude, 255 - g, g)
                b = tl.where(b >= magnitude, 255 - b, b)
            if operation == _SOLARIZE_ADD:
                added = magnitude.to(tl.int32)
                r = tl.where(r < 128, r + added, r)
                g = tl.where(g < 128, g + added, g)
                b = tl.where(b < 128, b + added, b)
            if operation == _INVERT:
                r, g, b = 255 - r, 255 - g, 255 - b
            if operation == _GREYSCALE:
                r = grey_level(r, g, b)
                g = r
                b = r
            if (operation == _CONTRAST) | (operation == _AUTOCONTRAST) | (operation == _EQUALIZE):
                table = tables + (sample * COLUMNS + k) * 768
                r = tl.load(table + r).to(tl.int32)
                g = tl.load(table + 256 + g).to(tl.int32)
                b = tl.load(table + 512 + b).to(tl.int32)
        r = tl.where(fill_column == k, fill & 255, r)
        g = tl.where(fill_column == k, (fill >> 8) & 255, g)
        b = tl.where(fill_column == k, fill >> 16, b)
    return r, g, b


@triton.jit
def operate(images, prepared, tables, row, sample, x, y, wanted, end, height, width, fill, COLUMNS: tl.constexpr):
    """Levels int32 (r, g, b) of one sample at (x, y) after its first `end` columns.

    Args:
        prepared: uint8 (N, 3, H, W). It holds the image after the last of these columns that has a slot, or the image
            before all of them if the row itself has a slot.
        tables: uint8 (B, COLUMNS, 3, 256), the new level for each level, for operations that need statistics.
        row: the sample's row of draws.
        wanted: which pixels are needed; the results of the others are undefined.

    The other arguments are those of `finish_kernel`.
    """
    first, slot = 0, tl.load(row)
    for k in tl.static_range(COLUMNS):
        kept = tl.where(k < end, tl.load(row + _FIELDS + k * _COLUMN + 2), -1)
        first, slot = tl.where(kept >= 0, k + 1, first), tl.where(kept >= 0, kept, slot)
    x, y, fill_column = _backwards(row, x, y, first, end, height, width, COLUMNS)
    r, g, b = _read(images, prepared, slot, sample, x, y, wanted & (fill_column < 0), height, width)
    return _forwards(row, tables, sample, r, g, b, fill_column, first, end, fill, COLUMNS)
