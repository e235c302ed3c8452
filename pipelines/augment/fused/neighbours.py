"""Operations that read neighbouring pixels, in Triton: one column of some samples, written for the kernels after it.

row of draws + the image before column k, at 9 pixels (sharpness) or 4 (bilinear) --> uint8 planes after column k
"""

from __future__ import annotations

import triton
import triton.language as tl

from sdpnet.pipelines.augment.fused.launch import COLUMN, FIELDS
from sdpnet.pipelines.augment.fused.operations import clamp_level, load_float, operate, source_of, to_even
from sdpnet.pipelines.planning.policies import Operation

__all__ = ["neighbour_kernel"]

_FIELDS, _COLUMN = tl.constexpr(FIELDS), tl.constexpr(COLUMN)
_SHARPNESS = tl.constexpr(int(Operation.SHARPNESS))


@triton.jit
def _sharpen(v, total, inside, weight):
    """`total` is of 3 x 3 levels with the middle counted five times; a whole number / 13 is never a tie."""
    difference = (2 * total + 13) // 26 - v
    return tl.where(inside, clamp_level(v.to(tl.float32) + difference.to(tl.float32) * weight), v)


@triton.jit
def _blend_fill(v, covered, fill, filled):
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
    """One column of the samples that have a slot there: sharpened, or resampled bilinearly; grid (blocks, B).

    Args:
        prepared: uint8 (N, 3, H, W), whose slots named by this column are written.
        column: the number of columns before it.
        red, green, blue: float32, `fill` not rounded, as bilinear resampling blends it.
        (the others as `finish_kernel`'s)
    """
    sample, pixels = tl.program_id(1), height * width
    row = draws + sample * (_FIELDS + COLUMNS * _COLUMN)
    place = row + _FIELDS + column * _COLUMN
    slot = tl.load(place + 2)
    if slot >= 0:
        offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        live = offset < pixels
        x, y = offset % width, offset // width
        r, g, b = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
        if tl.load(place) == _SHARPNESS:
            total_r, total_g, total_b = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
            for n in range(9):
                near_x = tl.minimum(tl.maximum(x + n % 3 - 1, 0), width - 1)
                near_y = tl.minimum(tl.maximum(y + n // 3 - 1, 0), height - 1)
                near_r, near_g, near_b = operate(
                    images, prepared, tables, row, sample, near_x, near_y, live, column, height, width, fill, COLUMNS
                )
                r, g, b = tl.where(n == 4, near_r, r), tl.where(n == 4, near_g, g), tl.where(n == 4, near_b, b)
                count = tl.where(n == 4, 5, 1)
                total_r += near_r * count
                total_g += near_g * count
                total_b += near_b * count
            weight = -load_float(place + 1)
            inside = (x > 0) & (x < width - 1) & (y > 0) & (y < height - 1)
            r, g = _sharpen(r, total_r, inside, weight), _sharpen(g, total_g, inside, weight)
            b = _sharpen(b, total_b, inside, weight)
        else:
            from_x, from_y = source_of(place, x, y, height, width)
            west, north = tl.floor(from_x), tl.floor(from_y)
            of_east, of_south = from_x - west, from_y - north
            sum_r, sum_g, sum_b = tl.zeros_like(west), tl.zeros_like(west), tl.zeros_like(west)
            covered = tl.zeros_like(west)
            for n in range(4):
                near_x, near_y = west.to(tl.int32) + n % 2, north.to(tl.int32) + n // 2
                inside = (near_x >= 0) & (near_x < width) & (near_y >= 0) & (near_y < height)
                weight = tl.where(n % 2 == 1, of_east, 1.0 - of_east) * tl.where(n // 2 == 1, of_south, 1.0 - of_south)
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
                    live & inside,
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
        tl.store(to, r.to(tl.uint8), mask=live)
        tl.store(to + pixels, g.to(tl.uint8), mask=live)
        tl.store(to + 2 * pixels, b.to(tl.uint8), mask=live)
