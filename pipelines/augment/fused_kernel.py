"""The device stage as one Triton kernel: each pixel's way backwards to its source, and forwards to what the model sees.

    row of draws + uint8 pixel(s) --(operations)--> --(normalise)--> --(erase)--> --(mix)--> one write

A row of draws, int32, as `pipelines.augment.fused` packs it: FIELDS values, then COLUMN values for each operation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pipelines.plan import ERASE_MODES, MIX_CUTMIX, MIX_MIXUP
from pipelines.policies import Operation

__all__ = ["COLUMN", "FIELDS", "finish_kernel"]

FIELDS = 14  # slot, erase box (4), erase key (low, high), mix kind, partner, lambda, mix box (4)
COLUMN = 8  # operation, magnitude, inverse affine matrix (6)

_FIELDS, _COLUMN = tl.constexpr(FIELDS), tl.constexpr(COLUMN)
_COLOUR_MODE, _PIXEL_MODE = tl.constexpr(ERASE_MODES.index("colour")), tl.constexpr(ERASE_MODES.index("pixel"))
_NO_ERASING = tl.constexpr(-1)
_MIXUP, _CUTMIX = tl.constexpr(MIX_MIXUP), tl.constexpr(MIX_CUTMIX)
_FIRST_GEOMETRIC, _LAST_GEOMETRIC = tl.constexpr(int(Operation.SHEAR_X)), tl.constexpr(int(Operation.ROTATE))
_BRIGHTNESS, _COLOUR = tl.constexpr(int(Operation.BRIGHTNESS)), tl.constexpr(int(Operation.COLOUR))
_POSTERIZE, _SOLARIZE = tl.constexpr(int(Operation.POSTERIZE)), tl.constexpr(int(Operation.SOLARIZE))
_SOLARIZE_ADD, _INVERT = tl.constexpr(int(Operation.SOLARIZE_ADD)), tl.constexpr(int(Operation.INVERT))
_GREYSCALE = tl.constexpr(int(Operation.GREYSCALE))


@triton.jit
def _float(row):
    return tl.load(row).to(tl.float32, bitcast=True)


@triton.jit
def _to_even(x):
    """The nearest whole number, ties to even, of |x| < 2^22: adding 1.5 * 2^23 leaves float32 no fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _level(x):
    return tl.minimum(tl.maximum(x, 0.0), 255.0).to(tl.int32)


@triton.jit
def _grey(r, g, b):
    grey = tl.fma(g.to(tl.float32), 0.587, r.to(tl.float32) * 0.2989)
    return tl.fma(b.to(tl.float32), 0.114, grey).to(tl.int32)


@triton.jit
def _blend(v, grey, factor, weight):
    return _level(tl.fma(grey, weight, v.to(tl.float32) * factor))


@triton.jit
def _normal(key, position):
    """As `pipelines.augment.noise.normal_noise`: output number `position` of SplitMix64, then Box & Muller."""
    x = key + (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    radius = ((x >> 40).to(tl.int32) + 1).to(tl.float32) * 5.960464477539063e-08  # 2^-24
    angle = (x & 0xFFFFFF).to(tl.int32).to(tl.float32) * 3.7450702829239286e-07  # 2^-24 * 2 pi
    return tl.sqrt(tl.log(radius) * -2.0) * tl.cos(angle)


@triton.jit
def _operated(images, prepared, row, sample, x, y, wanted, height, width, fill, COLUMNS: tl.constexpr):
    """Levels int32 (r, g, b) of one sample at (x, y), 0 where not wanted.

    Backwards through the columns to the pixel that ends here, then forwards through the operations on it. `born` is
    the last column that found nothing there but the fill.
    """
    born = tl.zeros_like(x) - 1
    for i in tl.static_range(COLUMNS):
        column = row + _FIELDS + (COLUMNS - 1 - i) * _COLUMN
        operation = tl.load(column)
        if (operation >= _FIRST_GEOMETRIC) & (operation <= _LAST_GEOMETRIC):
            from_x = x.to(tl.float32) + (1.0 - width) * 0.5
            from_y = y.to(tl.float32) + (1.0 - height) * 0.5
            grid_x = from_x * _float(column + 2) + from_y * _float(column + 3) + _float(column + 4)
            grid_y = from_x * _float(column + 5) + from_y * _float(column + 6) + _float(column + 7)
            to_x = _to_even(tl.fma(grid_x + 1.0, width * 0.5, -0.5))
            to_y = _to_even(tl.fma(grid_y + 1.0, height * 0.5, -0.5))
            outside = (to_x < 0) | (to_x >= width) | (to_y < 0) | (to_y >= height)
            born = tl.where((born < 0) & outside, COLUMNS - 1 - i, born)
            x = tl.where(outside, 0, to_x).to(tl.int32)
            y = tl.where(outside, 0, to_y).to(tl.int32)
    read = wanted & (born < 0)
    plane = height * width
    slot = tl.load(row)
    if slot >= 0:
        planar = prepared + slot.to(tl.int64) * 3 * plane + y * width + x
        r = tl.load(planar, mask=read, other=0).to(tl.int32)
        g = tl.load(planar + plane, mask=read, other=0).to(tl.int32)
        b = tl.load(planar + 2 * plane, mask=read, other=0).to(tl.int32)
    else:
        pixel = images + sample.to(tl.int64) * 3 * plane + (y * width + x) * 3
        r = tl.load(pixel, mask=read, other=0).to(tl.int32)
        g = tl.load(pixel + 1, mask=read, other=0).to(tl.int32)
        b = tl.load(pixel + 2, mask=read, other=0).to(tl.int32)
    for k in tl.static_range(COLUMNS):
        operation = tl.load(row + _FIELDS + k * _COLUMN)
        magnitude = _float(row + _FIELDS + k * _COLUMN + 1)
        if operation == _BRIGHTNESS:
            r = _level(r.to(tl.float32) * (1.0 + magnitude))
            g = _level(g.to(tl.float32) * (1.0 + magnitude))
            b = _level(b.to(tl.float32) * (1.0 + magnitude))
        if operation == _COLOUR:
            grey = _grey(r, g, b).to(tl.float32)
            r = _blend(r, grey, 1.0 + magnitude, -magnitude)
            g = _blend(g, grey, 1.0 + magnitude, -magnitude)
            b = _blend(b, grey, 1.0 + magnitude, -magnitude)
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
            r = _grey(r, g, b)
            g = r
            b = r
        r = tl.where(born == k, fill & 255, r)
        g = tl.where(born == k, (fill >> 8) & 255, g)
        b = tl.where(born == k, fill >> 16, b)
    return r, g, b


@triton.jit
def _finished(
    images,
    prepared,
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
    """Operated on, normalised and erased: float32 (r, g, b). `first` and `last` are the block's rows."""
    r, g, b = _operated(images, prepared, row, sample, x, y, wanted, height, width, fill, COLUMNS)
    r = r.to(tl.float32) * tl.load(scale) + tl.load(scale + 3)
    g = g.to(tl.float32) * tl.load(scale + 1) + tl.load(scale + 4)
    b = b.to(tl.float32) * tl.load(scale + 2) + tl.load(scale + 5)
    if ERASE != _NO_ERASING:
        top, left, tall, wide = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
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
def finish_kernel(
    images,
    prepared,
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
    """One block of BLOCK pixels of one sample a program; grid (blocks, B).

    Args:
        images: uint8 (B, H, W, 3).
        prepared: uint8 (N, 3, H, W), read in place of an image whose row has a slot from 0 on.
        draws: int32 (B, FIELDS + COLUMNS * COLUMN).
        scale: float32 (6,), what levels are multiplied by and what is then added, for red, green and blue.
        out: (B, H, W, 3), float32, float16 or bfloat16.
        fill: levels of what geometric operations leave uncovered: red + 256 green + 65,536 blue.
        ERASE: index into `ERASE_MODES`, or -1.
    """
    sample, pixels = tl.program_id(1), height * width
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first, last = tl.program_id(0) * BLOCK // width, (tl.program_id(0) * BLOCK + BLOCK - 1) // width
    live = offset < pixels
    x, y = offset % width, offset // width
    row = draws + sample * (_FIELDS + COLUMNS * _COLUMN)
    if MIX:
        kind, partner = tl.load(row + 7), tl.load(row + 8)
        top, left, tall, wide = tl.load(row + 10), tl.load(row + 11), tl.load(row + 12), tl.load(row + 13)
        inside = (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide) & (kind == _CUTMIX)
        weight = tl.where(kind == _MIXUP, _float(row + 9), tl.where(inside, 0.0, 1.0))
        r, g, b = _finished(
            images,
            prepared,
            row,
            scale,
            sample,
            x,
            y,
            live & (weight != 0.0),
            first,
            last,
            height,
            width,
            fill,
            COLUMNS,
            ERASE,
        )
        if (kind == _MIXUP) | ((kind == _CUTMIX) & (first < top + tall) & (last >= top)):
            other_row = draws + partner * (_FIELDS + COLUMNS * _COLUMN)
            other_r, other_g, other_b = _finished(
                images,
                prepared,
                other_row,
                scale,
                partner,
                x,
                y,
                live & (weight != 1.0),
                first,
                last,
                height,
                width,
                fill,
                COLUMNS,
                ERASE,
            )
            r = r * weight + other_r * (1.0 - weight)
            g = g * weight + other_g * (1.0 - weight)
            b = b * weight + other_b * (1.0 - weight)
    else:
        r, g, b = _finished(
            images,
            prepared,
            row,
            scale,
            sample,
            x,
            y,
            live,
            first,
            last,
            height,
            width,
            fill,
            COLUMNS,
            ERASE,
        )
    to = out + sample.to(tl.int64) * 3 * pixels + offset * 3
    tl.store(to, r.to(out.dtype.element_ty), mask=live)
    tl.store(to + 1, g.to(out.dtype.element_ty), mask=live)
    tl.store(to + 2, b.to(out.dtype.element_ty), mask=live)
