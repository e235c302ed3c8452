"""Depthwise convolution of channels-last images with bias and GELU, and its gradients, in Triton.

A program does some channels of one tile of one image: TILE columns of up to ROWS rows. A thread has two channels; it
keeps the sums of a row's TILE pixels in registers, so that each value it loads serves up to KERNEL of them.
"""

# ruff: noqa: RUF005 -- Triton knows no (*values, value)
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["convolve_kernel", "weight_gradient_kernel"]


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK: tl.constexpr):
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (tl.zeros([BLOCK], tl.float32),)  # type: ignore[assignment]
    return values


@triton.jit
def place_of(place, height, width, DIM: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):
    """Of a tile: the offset of its image, its first row and its first column."""
    tiles, bands = tl.cdiv(width, TILE), tl.cdiv(height, ROWS)
    sample = place // (tiles * bands)
    return sample.to(tl.int64) * height * width * DIM, place // tiles % bands * ROWS, place % tiles * TILE


@triton.jit
def within(channel, column, width, DIM: tl.constexpr, WHOLE: tl.constexpr):
    """Which channels there are of this column. A mask of both would be integers in Triton's interpreter."""
    return channel < (DIM if WHOLE else tl.where((column >= 0) & (column < width), DIM, 0))


@triton.jit
def load_row(
    source,
    factor,
    at,
    left,
    width,
    channel,
    DIM: tl.constexpr,
    FACTOR: tl.constexpr,
    COUNT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """float32 values of COUNT pixels from column `left` on, times `factor` with FACTOR; 0 outside of the image.

    `at` are the offsets of the pixel at `left`. With WHOLE, all columns are inside.
    """
    values = ()
    for n in tl.static_range(COUNT):  # constant offsets from one address: part of the instruction
        inside = within(channel, left + n, width, DIM, WHOLE)
        value = tl.load(source + at + n * DIM, mask=inside, other=0.0).to(tl.float32)
        if FACTOR:
            value *= tl.load(factor + at + n * DIM, mask=inside, other=0.0).to(tl.float32)
        values = values + (value,)  # type: ignore[assignment]
    return values


@triton.jit
def below_and_density(value):
    """Of the normal distribution, to 8e-8: with one exponential for both (Abramowitz & Stegun, 7.1.26)."""
    exponential = tl.exp(-0.5 * value * value)
    t = 1.0 / (1.0 + 0.23164189 * tl.abs(value))  # 0.3275911 / sqrt(2)
    tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    tail *= exponential
    return tl.where(value < 0, tail, 1.0 - tail), 0.3989422804014327 * exponential


@triton.jit(do_not_specialize=["height", "width"])
def convolve_kernel(
    x,
    factor,
    weight,
    bias,
    out,
    slope,
    height,
    width,
    DIM: tl.constexpr,
    KERNEL: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    BACKWARD: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Forward: GELU of the convolution. Backward: `x` is the gradient to that, `out` becomes the gradient to its input.

    Args:
        x, out, factor, slope: (B, height, width, dim) in memory.
        factor: backward: the slope that forward wrote; what is convolved, with the filter turned, is x times it.
        weight: (KERNEL * KERNEL, dim).
        bias: (dim,), forward only.
        slope: forward, with SLOPE: written, GELU's derivative.
        WHOLE: TILE is the width.
        (grid: blocks of BLOCK channels, fastest, times tiles, bands of rows and samples)
    """
    radius: tl.constexpr = KERNEL // 2
    margin: tl.constexpr = 0 if WHOLE else radius  # columns beside the tile
    blocks = tl.cdiv(DIM, BLOCK)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    live = channel < DIM
    image, top, left = place_of(tl.program_id(0) // blocks, height, width, DIM, TILE, ROWS)
    for row in range(top, tl.minimum(top + ROWS, height)):
        sums = zeros(TILE, BLOCK)
        for source_row in range(tl.maximum(row - radius, 0), tl.minimum(row + radius + 1, height)):
            at = image + (source_row * width + left - margin) * DIM + channel
            values = load_row(x, factor, at, left - margin, width, channel, DIM, BACKWARD, TILE + 2 * margin, WHOLE)
            filter_row = row - source_row if BACKWARD else source_row - row
            taps = weight + (filter_row + radius) * KERNEL * DIM + channel
            for j in tl.static_range(KERNEL):
                tap = taps + (KERNEL - 1 - j if BACKWARD else j) * DIM
                w = tl.load(tap, mask=live, other=0.0).to(tl.float32)
                for n in tl.static_range(TILE):
                    if n + j - radius + margin >= 0 and n + j - radius < TILE + margin:
                        value = sums[n] + values[n + j - radius + margin] * w
                        sums = sums[:n] + (value,) + sums[n + 1 :]
        at = image + (row * width + left) * DIM + channel
        for n in tl.static_range(TILE):
            inside = within(channel, left + n, width, DIM, WHOLE)
            value = sums[n]
            if not BACKWARD:
                value += tl.load(bias + channel, mask=live, other=0.0).to(tl.float32)
                below, density = below_and_density(value)
                if SLOPE:
                    tl.store(slope + at + n * DIM, (below + value * density).to(slope.dtype.element_ty), mask=inside)
                value *= below
            tl.store(out + at + n * DIM, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["height", "width", "places", "places_each"])
def weight_gradient_kernel(
    gradient,
    slope,
    x,
    partial,
    height,
    width,
    places,
    places_each,
    DIM: tl.constexpr,
    KERNEL: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over `places_each` tiles a program of what weight and bias get from each.

    Args:
        gradient, slope, x: (B, height, width, dim) in memory: to the output, and forward's.
        partial: float32 (programs, KERNEL * KERNEL + 1, dim), the last for the bias.
        places: tiles in all.
        (the others as `convolve_kernel`'s; grid: blocks of channels, fastest, times programs)
    """
    radius: tl.constexpr = KERNEL // 2
    margin: tl.constexpr = 0 if WHOLE else radius
    blocks = tl.cdiv(DIM, BLOCK)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    live = channel < DIM
    program = tl.program_id(0) // blocks
    sums, of_bias = zeros(KERNEL * KERNEL, BLOCK), tl.zeros([BLOCK], tl.float32)
    for place in range(program * places_each, tl.minimum((program + 1) * places_each, places)):
        image, top, left = place_of(place, height, width, DIM, TILE, ROWS)
        for row in range(top, tl.minimum(top + ROWS, height)):
            at = image + (row * width + left) * DIM + channel
            above = load_row(gradient, slope, at, left, width, channel, DIM, True, TILE, WHOLE)
            for n in tl.static_range(TILE):
                of_bias += above[n]
            for i in tl.static_range(KERNEL):
                source_row = row + i - radius
                if (source_row >= 0) & (source_row < height):
                    at = image + (source_row * width + left - margin) * DIM + channel
                    values = load_row(x, x, at, left - margin, width, channel, DIM, False, TILE + 2 * margin, WHOLE)
                    for j in tl.static_range(KERNEL):
                        for n in tl.static_range(TILE):
                            if n + j - radius + margin >= 0 and n + j - radius < TILE + margin:
                                value = sums[i * KERNEL + j] + values[n + j - radius + margin] * above[n]
                                sums = sums[: i * KERNEL + j] + (value,) + sums[i * KERNEL + j + 1 :]
    to = partial + program.to(tl.int64) * (KERNEL * KERNEL + 1) * DIM + channel
    for tap in tl.static_range(KERNEL * KERNEL):
        tl.store(to + tap * DIM, sums[tap], mask=live)
    tl.store(to + KERNEL * KERNEL * DIM, of_bias, mask=live)
