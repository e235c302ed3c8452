"""The last kernel of the device stage, in Triton: applies operations, normalises, erases and mixes in one pass.

    row of draws + uint8 pixel(s) --(operations)--> --(normalise)--> --(erase)--> --(mix)--> one write

A program works backwards from a block of output pixels: it finds the source pixel of each one, reads it, and applies
the operations to its levels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sdpnet.pipelines.augment.fused.launch import COLUMN, FIELDS
from sdpnet.pipelines.augment.fused.operations import load_float, operate, place_of
from sdpnet.pipelines.plan import ERASE_MODES, MIX_CUTMIX, MIX_MIXUP

__all__ = ["finish_kernel"]

_FIELDS, _COLUMN = tl.constexpr(FIELDS), tl.constexpr(COLUMN)
_COLOUR_MODE, _PIXEL_MODE = tl.constexpr(ERASE_MODES.index("colour")), tl.constexpr(ERASE_MODES.index("pixel"))
_NO_ERASING = tl.constexpr(-1)
_MIXUP, _CUTMIX = tl.constexpr(MIX_MIXUP), tl.constexpr(MIX_CUTMIX)


@triton.jit
def _normal(key, position):
    """Standard normal values, float32, computed as in `sdpnet.pipelines.augment.reference.noise.normal_noise`.

    Output number `position` of SplitMix64 from `key`, turned into a normal value by the Box-Muller transform.
    """
    # Both halves keep 24 bits, which float32 holds exactly, and go through int32, which holds them too. The radius gets
    # 1 added, so that the logarithm of 0 is never taken.
    x = key + (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    radius = ((x >> 40).to(tl.int32) + 1).to(tl.float32) * 5.960464477539063e-08  # 2^-24
    angle = (x & 0xFFFFFF).to(tl.int32).to(tl.float32) * 3.7450702829239286e-07  # 2^-24 * 2 pi
    return tl.sqrt(tl.log(radius) * -2.0) * tl.cos(angle)


@triton.jit
def _augmented(
    images,
    prepared,
    tables,
    row,
    scale,
    sample,
    x,
    y,
    wanted,
    first,
    last,
    height,
    width,
    fill,
    COLUMNS: tl.constexpr,
    ERASE: tl.constexpr,
):
    """One sample's pixels at (x, y) after operations, normalisation and erasing: float32 (r, g, b).

    `first` and `last` are the first and the last image row of the program's block.
    """
    r, g, b = operate(images, prepared, tables, row, sample, x, y, wanted, COLUMNS, height, width, fill, COLUMNS)
    # Products and sums stay separate operations: the launch turns the contraction to FMA off (`enable_fp_fusion`),
    # because the reference rounds twice.
    r = r.to(tl.float32) * tl.load(scale) + tl.load(scale + 3)
    g = g.to(tl.float32) * tl.load(scale + 1) + tl.load(scale + 4)
    b = b.to(tl.float32) * tl.load(scale + 2) + tl.load(scale + 5)
    if ERASE != _NO_ERASING:
        top, left, tall, wide = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
        # A block whose rows the box does not touch skips the noise, which takes a logarithm and a cosine per value.
        if (first < top + tall) & (last >= top):
            inside = (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide)
            new_r, new_g, new_b = tl.zeros_like(r), tl.zeros_like(r), tl.zeros_like(r)
            if (ERASE == _COLOUR_MODE) | (ERASE == _PIXEL_MODE):
                low, high = tl.load(row + 5).to(tl.uint32, bitcast=True), tl.load(row + 6).to(tl.uint32, bitcast=True)
                key = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
                if ERASE == _PIXEL_MODE:
                    position, step = y * width + x, height * width
                else:
                    position, step = tl.zeros_like(x), 1
                new_r = _normal(key, position)
                new_g = _normal(key, position + step)
                new_b = _normal(key, position + 2 * step)
            r, g, b = tl.where(inside, new_r, r), tl.where(inside, new_g, g), tl.where(inside, new_b, b)
    return r, g, b


@triton.jit
def _own_weight(row, x, y, first, last):
    """The weight, float32, of a sample's own pixels at (x, y), and whether the block has one that is less than 1."""
    kind = tl.load(row + 7)
    top, left, tall, wide = tl.load(row + 10), tl.load(row + 11), tl.load(row + 12), tl.load(row + 13)
    inside = (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide) & (kind == _CUTMIX)
    touched = (kind == _MIXUP) | ((kind == _CUTMIX) & (first < top + tall) & (last >= top))
    return tl.where(kind == _MIXUP, load_float(row + 9), tl.where(inside, 0.0, 1.0)), touched


@triton.jit
def finish_kernel(
    images,
    prepared,
    tables,
    draws,
    scale,
    out,
    height,
    width,
    fill,
    COLUMNS: tl.constexpr,
    ERASE: tl.constexpr,
    MIX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the finished pixels of a batch. Each program writes BLOCK pixels of one sample; the grid is (blocks, B).

    With MIX, the second index of the grid counts the samples that `draws` lists as first of a pair (see
    `launch.FIELDS`). A program then also writes the partner's pixels if the two are mixed with each other.

    Args:
        images: uint8 (B, H, W, 3).
        prepared: uint8 (N, 3, H, W), read instead of `images` where a row or column of draws has a slot >= 0.
        tables: uint8 (B, COLUMNS, 3, 256), the new level for each level, from `table_kernel`. Not read where no
            operation needs statistics.
        draws: int32 (B, FIELDS + COLUMNS * COLUMN), laid out as in `sdpnet.pipelines.augment.fused.launch`.
        scale: float32 (6,), the factors of red, green and blue levels, followed by the addends.
        out: (B, H, W, 3), float32, float16 or bfloat16.
        fill: levels of pixels that geometric operations leave uncovered: red + 256 green + 65,536 blue.
        COLUMNS: the number of operations per sample.
        ERASE: index into `ERASE_MODES`, or -1 for no erasing.
        MIX: whether samples are mixed with their partners.
    """
    pixels, start = height * width, tl.program_id(0) * BLOCK
    offset = start + tl.arange(0, BLOCK)
    first, last = start // width, (start + BLOCK - 1) // width
    mask = offset < pixels
    x, y = place_of(start, width, BLOCK)
    if MIX:
        # Two samples that are mixed with each other are computed once, by one program, which writes both.
        sample = tl.load(draws + tl.program_id(1) * (_FIELDS + COLUMNS * _COLUMN) + 14)
        row = draws + sample * (_FIELDS + COLUMNS * _COLUMN)
        partner = tl.load(row + 8)
        other_row = draws + partner * (_FIELDS + COLUMNS * _COLUMN)
        both = (tl.load(other_row + 8) == sample) & (partner != sample)
        weight, touched = _own_weight(row, x, y, first, last)
        other_weight, _ = _own_weight(other_row, x, y, first, last)
        # Pixels of weight 0 are not read.
        r, g, b = _augmented(
            images,
            prepared,
            tables,
            row,
            scale,
            sample,
            x,
            y,
            mask & ((weight != 0.0) | (both & (other_weight != 1.0))),
            first,
            last,
            height,
            width,
            fill,
            COLUMNS,
            ERASE,
        )
        if touched | both:
            other_r, other_g, other_b = _augmented(
                images,
                prepared,
                tables,
                other_row,
                scale,
                partner,
                x,
                y,
                mask & ((weight != 1.0) | (both & (other_weight != 0.0))),
                first,
                last,
                height,
                width,
                fill,
                COLUMNS,
                ERASE,
            )
            if both:
                rest = 1.0 - other_weight
                target = out + partner.to(tl.int64) * 3 * pixels + offset * 3
                tl.store(target, (other_r * other_weight + r * rest).to(out.dtype.element_ty), mask=mask)
                tl.store(target + 1, (other_g * other_weight + g * rest).to(out.dtype.element_ty), mask=mask)
                tl.store(target + 2, (other_b * other_weight + b * rest).to(out.dtype.element_ty), mask=mask)
            r = r * weight + other_r * (1.0 - weight)
            g = g * weight + other_g * (1.0 - weight)
            b = b * weight + other_b * (1.0 - weight)
    else:
        sample = tl.program_id(1)
        r, g, b = _augmented(
            images,
            prepared,
            tables,
            draws + sample * (_FIELDS + COLUMNS * _COLUMN),
            scale,
            sample,
            x,
            y,
            mask,
            first,
            last,
            height,
            width,
            fill,
            COLUMNS,
            ERASE,
        )
    target = out + sample.to(tl.int64) * 3 * pixels + offset * 3
    tl.store(target, r.to(out.dtype.element_ty), mask=mask)
    tl.store(target + 1, g.to(out.dtype.element_ty), mask=mask)
    tl.store(target + 2, b.to(out.dtype.element_ty), mask=mask)
