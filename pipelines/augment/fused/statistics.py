"""Contrast, autocontrast and equalize in Triton: counts an image's levels, then makes a table of new levels from them.

    row of draws + the image as it is before column k --(count_kernel)--> counts --(table_kernel)--> tables of column k

Counts are integers, so the order in which programs add them does not change the tables.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sdpnet.pipelines.augment.fused.launch import COLUMN, FIELDS
from sdpnet.pipelines.augment.fused.operations import (
    blend_level,
    clamp_level,
    grey_level,
    load_float,
    operate,
    place_of,
)
from sdpnet.pipelines.planning.policies import Operation

__all__ = ["count_kernel", "table_kernel"]

_FIELDS, _COLUMN = tl.constexpr(FIELDS), tl.constexpr(COLUMN)
_CONTRAST, _AUTOCONTRAST = tl.constexpr(int(Operation.CONTRAST)), tl.constexpr(int(Operation.AUTOCONTRAST))
_EQUALIZE = tl.constexpr(int(Operation.EQUALIZE))


# A program counts BLOCKS blocks in registers before it adds the counts to memory: 256 atomic additions per channel for
# all of its pixels. Counting 512 pixels at once instead of 256 took 109 registers a thread instead of 56, and 1,024
# took 195 (records/LOG.md, with an earlier kernel).
@triton.jit(do_not_specialize=["column"])
def count_kernel(
    images,
    prepared,
    tables,
    draws,
    counts,
    column,
    height,
    width,
    fill,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Counts the levels of the samples whose operation in one column needs statistics. The grid is (programs, B).

    Args:
        tables: uint8 (B, COLUMNS, 3, 256), filled in for the columns before this one.
        counts: int32 (B, COLUMNS, 3, 256), zeros on entry. For contrast, channel 0 counts grey levels.
        column: index of the column; the image is counted as it is before that column.
        BLOCKS: the number of blocks of BLOCK pixels that each program counts.

    The other arguments are those of `finish_kernel`.
    """
    sample, pixels = tl.program_id(1), height * width
    row = draws + sample * (_FIELDS + COLUMNS * _COLUMN)
    operation = tl.load(row + _FIELDS + column * _COLUMN)
    if (operation == _CONTRAST) | (operation == _AUTOCONTRAST) | (operation == _EQUALIZE):
        levels = tl.arange(0, 256)
        counts_r, counts_g, counts_b = tl.zeros_like(levels), tl.zeros_like(levels), tl.zeros_like(levels)
        first = tl.program_id(0) * BLOCKS
        for n in range(first, tl.minimum(first + BLOCKS, tl.cdiv(pixels, BLOCK))):
            offset = n * BLOCK + tl.arange(0, BLOCK)
            mask = offset < pixels
            x, y = place_of(n * BLOCK, width, BLOCK)
            r, g, b = operate(images, prepared, tables, row, sample, x, y, mask, column, height, width, fill, COLUMNS)
            if operation == _CONTRAST:
                counts_r += tl.histogram(grey_level(r, g, b), 256, mask=mask)
            else:
                counts_r += tl.histogram(r, 256, mask=mask)
                counts_g += tl.histogram(g, 256, mask=mask)
                counts_b += tl.histogram(b, 256, mask=mask)
        to = counts + (sample * COLUMNS + column) * 768 + levels
        tl.atomic_add(to, counts_r, mask=counts_r > 0, sem="relaxed")
        tl.atomic_add(to + 256, counts_g, mask=counts_g > 0, sem="relaxed")
        tl.atomic_add(to + 512, counts_b, mask=counts_b > 0, sem="relaxed")


@triton.jit(do_not_specialize=["column"])
def table_kernel(draws, counts, tables, column, pixels, COLUMNS: tl.constexpr):
    """Makes the tables of new levels for one column, from its counts. The grid is (3, B), one program per channel.

    The arithmetic is that of `sdpnet.pipelines.augment.reference.levels`, with the same roundings: divisions are
    correctly rounded (`div_rn`), and the sum for contrast is int64, since 255 times the pixels may exceed int32.
    """
    channel, sample = tl.program_id(0), tl.program_id(1)
    entry = draws + sample * (_FIELDS + COLUMNS * _COLUMN) + _FIELDS + column * _COLUMN
    operation, magnitude = tl.load(entry), load_float(entry + 1)
    level = tl.arange(0, 256)
    image_offset = (sample * COLUMNS + column) * 768
    channel_offset = image_offset + channel * 256 + level
    if operation == _CONTRAST:
        total = tl.sum(tl.load(counts + image_offset + level).to(tl.int64) * level)
        mean = tl.div_rn(total.to(tl.float32), pixels * 1.0)
        tl.store(tables + channel_offset, blend_level(level, mean, 1.0 + magnitude, -magnitude).to(tl.uint8))
    if operation == _AUTOCONTRAST:
        count = tl.load(counts + channel_offset)
        low = tl.min(tl.where(count > 0, level, 255))
        high = tl.max(tl.where(count > 0, level, 0))
        scale = (high - low).to(tl.float32) * 0.00392156862745098  # 1 / 255
        stretched = tl.div_rn((level - low).to(tl.float32), tl.where(high > low, scale, 1.0))
        tl.store(tables + channel_offset, tl.where(high > low, clamp_level(stretched), level).to(tl.uint8))
    if operation == _EQUALIZE:
        count = tl.load(counts + channel_offset)
        highest = tl.max(tl.where(count > 0, level, 0))
        step = (pixels - tl.sum(tl.where(level == highest, count, 0))) // 255
        below = tl.cumsum(count) - count
        spread = tl.minimum((below + step // 2) // tl.maximum(step, 1), 255)
        tl.store(tables + channel_offset, tl.where(step > 0, spread, level).to(tl.uint8))
