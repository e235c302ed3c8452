"""Operations that read neighbouring pixels, in Triton: sharpness and bilinear resampling.

    row of draws + the image before column k, at 9 pixels (sharpness) or 4 (bilinear) --> uint8 planes after column k

One launch executes one column of draws, for the samples that drew such an operation there. The kernels after it read
the written planes instead of the image.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sdpnet.pipelines.augment.fused.launch import COLUMN, FIELDS
from sdpnet.pipelines.augment.fused.operations import clamp_level, load_float, operate, place_of, source_of, to_even
from sdpnet.pipelines.planning.policies import Operation

__all__ = ["neighbour_kernel"]

_FIELDS, _COLUMN = tl.constexpr(FIELDS), tl.constexpr(COLUMN)
_SHARPNESS = tl.constexpr(int(Operation.SHARPNESS))


# Sharpness has a kernel of its own because a loop over nine pixels in `finish_kernel` took it from 40 to 80 registers a
# thread and its compilation from 1.3 to 3.3 s, for the 14 % of RandAugment's samples that draw it (records/LOG.md).
#
# The mean of the 3 x 3 pixels is rounded in integers. A whole number divided by 13 is never halfway between two whole
# numbers, so the quotient needs no rule for ties and equals the reference's rounded float32 division.
@triton.jit
def _sharpen(v, total, inside, weight):
    """Levels `v` after sharpening. `total` is the sum of 3 x 3 levels in which the middle one counts five times."""
    difference = (2 * total + 13) // 26 - v
    return tl.where(inside, clamp_level(v.to(tl.float32) + difference.to(tl.float32) * weight), v)


@triton.jit
def _blend_fill(v, covered, fill, filled):
    """Blends a sum of weighted levels with the fill by the weight `covered` of the pixels inside the image."""
    return to_even(tl.where(filled, (v - fill) * covered + fill, v)).to(tl.int32)


@triton.jit(do_not_specialize=["column"])
def neighbour_kernel(
    images,
    prepared,
    tables,
    draws,
    column,
    height,
    width,
    fill,
    red,
    green,
    blue,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sharpens or resamples the samples that have a slot in one column of draws. The grid is (blocks, B).

    Args:
        prepared: uint8 (N, 3, H, W). The slots that this column names are written.
        column: index of the column. It is not specialised, so that one compiled kernel serves all columns.
        red, green, blue: float32, the levels of `fill` before rounding: bilinear resampling blends with these.

    The other arguments are those of `finish_kernel`.
    """
    sample, pixels = tl.program_id(1), height * width
    row = draws + sample * (_FIELDS + COLUMNS * _COLUMN)
    entry = row + _FIELDS + column * _COLUMN
    slot = tl.load(entry + 2)
    if slot >= 0:
        offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = offset < pixels
        x, y = place_of(tl.program_id(0) * BLOCK, width, BLOCK)
        r, g, b = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
        if tl.load(entry) == _SHARPNESS:
            total_r, total_g, total_b = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
            for n in range(9):
                near_x = tl.minimum(tl.maximum(x + n % 3 - 1, 0), width - 1)
                near_y = tl.minimum(tl.maximum(y + n // 3 - 1, 0), height - 1)
                near_r, near_g, near_b = operate(
                    images, prepared, tables, row, sample, near_x, near_y, mask, column, height, width, fill, COLUMNS
                )
                r, g, b = tl.where(n == 4, near_r, r), tl.where(n == 4, near_g, g), tl.where(n == 4, near_b, b)
                count = tl.where(n == 4, 5, 1)
                total_r += near_r * count
                total_g += near_g * count
                total_b += near_b * count
            weight = -load_float(entry + 1)
            inside = (x > 0) & (x < width - 1) & (y > 0) & (y < height - 1)
            r, g = _sharpen(r, total_r, inside, weight), _sharpen(g, total_g, inside, weight)
            b = _sharpen(b, total_b, inside, weight)
        else:
            from_x, from_y = source_of(entry, x, y, height, width)
            west, north = tl.floor(from_x), tl.floor(from_y)
            east, south = from_x - west, from_y - north
            sum_r, sum_g, sum_b = tl.zeros_like(west), tl.zeros_like(west), tl.zeros_like(west)
            covered = tl.zeros_like(west)
            for n in range(4):
                near_x, near_y = west.to(tl.int32) + n % 2, north.to(tl.int32) + n // 2
                inside = (near_x >= 0) & (near_x < width) & (near_y >= 0) & (near_y < height)
                weight = tl.where(n % 2 == 1, east, 1.0 - east) * tl.where(n // 2 == 1, south, 1.0 - south)
                weight = tl.where(inside, weight, 0.0)
                near_x, near_y = tl.where(inside, near_x, 0), tl.where(inside, near_y, 0)
                near_r, near_g, near_b = operate(
                    images,
                    prepared,
                    tables,
                    row,
                    sample,
                    near_x,
                    near_y,
                    mask & inside,
                    column,
                    height,
                    width,
                    0,
                    COLUMNS,
                )
                sum_r += near_r.to(tl.float32) * weight
                sum_g += near_g.to(tl.float32) * weight
                sum_b += near_b.to(tl.float32) * weight
                covered += weight
            filled = (red != 0) | (green != 0) | (blue != 0)
            r, g = _blend_fill(sum_r, covered, red, filled), _blend_fill(sum_g, covered, green, filled)
            b = _blend_fill(sum_b, covered, blue, filled)
        to = prepared + slot.to(tl.int64) * 3 * pixels + offset
        tl.store(to, r.to(tl.uint8), mask=mask)
        tl.store(to + pixels, g.to(tl.uint8), mask=mask)
        tl.store(to + 2 * pixels, b.to(tl.uint8), mask=mask)
