"""New levels for operations that need statistics of an image, in Triton: histograms, then a table for each channel.

    row of draws + the image as it is before column k --(count_kernel)--> counts --(table_kernel)--> tables of column k

Counts are integers: in whatever order they are added, each table is the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sdpnet.pipelines.augment.fused.launch import COLUMN, FIELDS
from sdpnet.pipelines.augment.fused.operations import blend_level, clamp_level, grey_level, load_float, operate
from sdpnet.pipelines.planning.policies import Operation

__all__ = ["count_kernel", "table_kernel"]

_FIELDS, _COLUMN = tl.constexpr(FIELDS), tl.constexpr(COLUMN)
_CONTRAST, _AUTOCONTRAST = tl.constexpr(int(Operation.CONTRAST)), tl.constexpr(int(Operation.AUTOCONTRAST))
_EQUALIZE = tl.constexpr(int(Operation.EQUALIZE))


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
    """Counts the levels before one column, of the samples with such an operation there; grid (programs, B).

    Args:
        tables: uint8 (B, COLUMNS, 3, 256), filled in for the columns before.
        counts: int32 (B, COLUMNS, 3, 256), zeros; contrast's are those of grey levels, in the first channel.
        column: the number of columns before it.
        BLOCKS: of BLOCK pixels each, one after the other, for each program.
        (the others as `finish_kernel`'s)
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
            live = offset < pixels
            x, y = offset % width, offset // width
            r, g, b = operate(images, prepared, tables, row, sample, x, y, live, column, height, width, fill, COLUMNS)
            if operation == _CONTRAST:
                counts_r += tl.histogram(grey_level(r, g, b), 256, mask=live)
            else:
                counts_r += tl.histogram(r, 256, mask=live)
                counts_g += tl.histogram(g, 256, mask=live)
                counts_b += tl.histogram(b, 256, mask=live)
        to = counts + (sample * COLUMNS + column) * 768 + levels
        tl.atomic_add(to, counts_r, mask=counts_r > 0, sem="relaxed")
        tl.atomic_add(to + 256, counts_g, mask=counts_g > 0, sem="relaxed")
        tl.atomic_add(to + 512, counts_b, mask=counts_b > 0, sem="relaxed")


@triton.jit(do_not_specialize=["column"])
def table_kernel(draws, counts, tables, column, pixels, COLUMNS: tl.constexpr):
    """One channel's new levels, from one column's counts, by `sdpnet.pipelines.augment.reference.levels`' arithmetic;
    grid (3, B)."""
    channel, sample = tl.program_id(0), tl.program_id(1)
    place = draws + sample * (_FIELDS + COLUMNS * _COLUMN) + _FIELDS + column * _COLUMN
    operation, magnitude = tl.load(place), load_float(place + 1)
    level = tl.arange(0, 256)
    of_image = (sample * COLUMNS + column) * 768
    of_channel = of_image + channel * 256 + level
    if operation == _CONTRAST:
        total = tl.sum(tl.load(counts + of_image + level).to(tl.int64) * level)
        mean = tl.div_rn(total.to(tl.float32), pixels * 1.0)
        tl.store(tables + of_channel, blend_level(level, mean, 1.0 + magnitude, -magnitude).to(tl.uint8))
    if operation == _AUTOCONTRAST:
        count = tl.load(counts + of_channel)
        low = tl.min(tl.where(count > 0, level, 255))
        high = tl.max(tl.where(count > 0, level, 0))
        scale = (high - low).to(tl.float32) * 0.00392156862745098  # 1 / 255
        stretched = tl.div_rn((level - low).to(tl.float32), tl.where(high > low, scale, 1.0))
        tl.store(tables + of_channel, tl.where(high > low, clamp_level(stretched), level).to(tl.uint8))
    if operation == _EQUALIZE:
        count = tl.load(counts + of_channel)
        highest = tl.max(tl.where(count > 0, level, 0))
        step = (pixels - tl.sum(tl.where(level == highest, count, 0))) // 255
        below = tl.cumsum(count) - count
        spread = tl.minimum((below + step // 2) // tl.maximum(step, 1), 255)
        tl.store(tables + of_channel, tl.where(step > 0, spread, level).to(tl.uint8))
