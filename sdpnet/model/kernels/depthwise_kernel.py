"""Depthwise convolution of channels-last images with bias and GELU, and its gradients, in Triton.

A program computes some channels of one tile of one image: TILE columns of up to ROWS rows. Instructions limit these
kernels rather than memory (records/LOG.md, "What the depthwise kernels keep for backward"). A thread therefore has two
channels and keeps the sums of a row's TILE pixels in registers, so that each value that it loads is used for up to
KERNEL of them.

DIM is a compile-time constant, and a row is addressed from one pointer, because the kernels then need fewer registers:
78 a thread instead of 121 in the forward pass (the next entry of the log).
"""

# ruff: noqa: RUF005 -- Triton does not support (*values, value)
from __future__ import annotations

import triton
import triton.language as tl

from sdpnet.model.kernels.gelu_kernel import INTERPRETED, below_and_density

__all__ = ["convolve_kernel", "weight_gradient_kernel"]


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK: tl.constexpr):
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (tl.zeros([BLOCK], tl.float32),)  # type: ignore[assignment]
    return values


@triton.jit
def locate_tile(tile, height, width, DIM: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):
    """The offset of a tile's image, the tile's first row and its first column."""
    tiles, bands = tl.cdiv(width, TILE), tl.cdiv(height, ROWS)
    sample = tile // (tiles * bands)
    return sample.to(tl.int64) * height * width * DIM, tile // tiles % bands * ROWS, tile % tiles * TILE


@triton.jit
def within(channel, column, width, DIM: tl.constexpr, WHOLE: tl.constexpr):
    """The mask of the channels to load in a column: none where the column is outside of the image.

    Triton's interpreter would make integers of the conjunction of two masks, so there is a single comparison.
    """
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
    """Loads COUNT pixels of a row from column `left` on as float32; 0 outside of the image.

    With FACTOR, the values are multiplied by those of `factor`. `at` holds the offsets of the pixel at `left`. With
    WHOLE, all columns are inside of the image.
    """
    values = ()
    for n in tl.static_range(COUNT):  # a constant offset from one address is part of the load instruction
        inside = within(channel, left + n, width, DIM, WHOLE)
        value = tl.load(source + at + n * DIM, mask=inside, other=0.0).to(tl.float32)
        if FACTOR:
            value *= tl.load(factor + at + n * DIM, mask=inside, other=0.0).to(tl.float32)
        values = values + (value,)  # type: ignore[assignment]
    return values


@triton.constexpr_function
def dot_instructions(count):
    """The instructions that add `count` products to a number: $0 = $1 + sum of $(2 + n) * $(2 + count + n)."""
    products = [f"fma.rn.f32 t, ${2 + n}, ${2 + count + n}, {'t' if n else '$1'};" for n in range(count)]
    return " ".join(["{ .reg .f32 t;", *products, "mov.f32 $0, t; }"])


@triton.constexpr_function
def dot_operands(count):
    return ",".join(["=f", "f", *["f"] * (2 * count)])


@triton.jit
def add_dot(total, left, right, FIRST: tl.constexpr, COUNT: tl.constexpr, SHIFT: tl.constexpr):
    """total + left[FIRST + SHIFT] * right[FIRST] + ..., in this order, for COUNT pairs of float32 tensors.

    It is a single operation for Triton, whose time for a kernel rises with the square of the number of operations: the
    analysis of the weights' gradient took 14 s with two operations for each product (records/LOG.md).
    """
    if INTERPRETED:
        for n in tl.static_range(COUNT):
            total += left[FIRST + SHIFT + n] * right[FIRST + n]
        return total
    values = left[FIRST + SHIFT : FIRST + SHIFT + COUNT] + right[FIRST : FIRST + COUNT]
    return tl.inline_asm_elementwise(
        dot_instructions(COUNT), dot_operands(COUNT), (total,) + values, tl.float32, is_pure=True, pack=1
    )


@triton.jit
def add_products(sums, values, upstream, KERNEL: tl.constexpr, TILE: tl.constexpr, margin: tl.constexpr):
    """Adds the products of one row of pixels to the sums of one row of taps.

    Args:
        sums: KERNEL sums.
        values: the TILE + 2 * margin pixels of the input.
        upstream: the TILE pixels of the gradient.
    """
    radius: tl.constexpr = KERNEL // 2
    results = ()
    for j in tl.static_range(KERNEL):
        # Pixel n of the gradient meets pixel n + j - radius + margin of the values, where there is one.
        total = sums[j]
        if max(0, radius - margin - j) < min(TILE, TILE + radius + margin - j):
            total = add_dot(
                total,
                values,
                upstream,
                max(0, radius - margin - j),
                min(TILE, TILE + radius + margin - j) - max(0, radius - margin - j),
                j - radius + margin,
            )
        results = results + (total,)  # type: ignore[assignment]
    return results


@triton.jit
def add_taps(
    sums,
    values,
    taps,
    live,
    DIM: tl.constexpr,
    KERNEL: tl.constexpr,
    TILE: tl.constexpr,
    margin: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Adds the products with one row of taps to the TILE sums of a row of pixels.

    Args:
        values: the TILE + 2 * margin pixels of the source row.
        taps: where the row's first tap lies, for each channel.
    """
    radius: tl.constexpr = KERNEL // 2
    for j in tl.static_range(KERNEL):
        w = tl.load(taps + (KERNEL - 1 - j if BACKWARD else j) * DIM, mask=live, other=0.0).to(tl.float32)
        results = ()
        for n in tl.static_range(TILE):
            value = sums[n]
            if n + j - radius + margin >= 0 and n + j - radius < TILE + margin:
                value = tl.fma(values[n + j - radius + margin], w, value)
            results = results + (value,)  # type: ignore[assignment]
        sums = results
    return sums


@triton.jit
def store_row(
    sums,
    bias,
    out,
    slope,
    at,
    left,
    width,
    channel,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
    BACKWARD: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """Stores a row of results of `convolve_kernel`, whose arguments these are. `at` holds the offsets at `left`."""
    for n in tl.static_range(TILE):
        inside = within(channel, left + n, width, DIM, WHOLE)
        value = sums[n]
        if not BACKWARD:
            value += tl.load(bias + channel, mask=channel < DIM, other=0.0).to(tl.float32)
            below, density = below_and_density(value)
            if SLOPE:
                tl.store(slope + at + n * DIM, (below + value * density).to(slope.dtype.element_ty), mask=inside)
            value *= below
        tl.store(out + at + n * DIM, value.to(out.dtype.element_ty), mask=inside)


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
    """Computes GELU of the convolution or, with BACKWARD, the gradient to the input of the convolution.

    The grid is one-dimensional: blocks of BLOCK channels change fastest, then tiles, bands of rows and samples.

    Args:
        x: (B, height, width, dim) in memory. BACKWARD: the gradient to the result of the forward pass.
        factor: BACKWARD: the slope that the forward pass wrote, of the shape of x. x times factor is convolved with the
            filter rotated by 180 degrees.
        weight: (KERNEL * KERNEL, dim).
        bias: (dim,), used in the forward pass only.
        out: the result, of the shape of x.
        slope: forward pass with SLOPE: GELU's derivative is written to it; of the shape of x.
        WHOLE: whether TILE is the width.
    """
    radius: tl.constexpr = KERNEL // 2
    margin: tl.constexpr = 0 if WHOLE else radius  # the columns to load on each side of the tile
    blocks = tl.cdiv(DIM, BLOCK)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    live = channel < DIM
    image, top, left = locate_tile(tl.program_id(0) // blocks, height, width, DIM, TILE, ROWS)
    # The sums of a row are a tuple of TILE tensors, so that each of them stays in registers of its own while the rows
    # of the input are read. Taps outside of the image are skipped by the limits of the loops and by `if` at compile
    # time: for 14 x 14 pixels and a filter of 7 x 7 they are 23 % of all taps.
    for row in range(top, tl.minimum(top + ROWS, height)):
        sums = zeros(TILE, BLOCK)
        for source_row in range(tl.maximum(row - radius, 0), tl.minimum(row + radius + 1, height)):
            at = image + (source_row * width + left - margin) * DIM + channel
            values = load_row(x, factor, at, left - margin, width, channel, DIM, BACKWARD, TILE + 2 * margin, WHOLE)
            filter_row = row - source_row if BACKWARD else source_row - row
            taps = weight + (filter_row + radius) * KERNEL * DIM + channel
            sums = add_taps(sums, values, taps, live, DIM, KERNEL, TILE, margin, BACKWARD)
        at = image + (row * width + left) * DIM + channel
        store_row(sums, bias, out, slope, at, left, width, channel, DIM, TILE, WHOLE, BACKWARD, SLOPE)


@triton.jit
def add_row(
    sums,
    bias_sum,
    gradient,
    slope,
    x,
    image,
    row,
    left,
    height,
    width,
    channel,
    DIM: tl.constexpr,
    KERNEL: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Adds what the pixels of one row of the gradient contribute to the sums of all taps and of the bias.

    It is a function of its own because Triton translates the body of a loop twice, and that of a loop inside four
    times.
    """
    radius: tl.constexpr = KERNEL // 2
    margin: tl.constexpr = 0 if WHOLE else radius
    at = image + (row * width + left) * DIM + channel
    upstream = load_row(gradient, slope, at, left, width, channel, DIM, True, TILE, WHOLE)
    for n in tl.static_range(TILE):
        bias_sum += upstream[n]
    results = ()
    for i in tl.static_range(KERNEL):
        source_row = row + i - radius
        tap_sums = sums[i * KERNEL : (i + 1) * KERNEL]
        if (source_row >= 0) & (source_row < height):
            source = image + (source_row * width + left - margin) * DIM + channel
            values = load_row(x, x, source, left - margin, width, channel, DIM, False, TILE + 2 * margin, WHOLE)
            tap_sums = add_products(tap_sums, values, upstream, KERNEL, TILE, margin)
        results = results + tap_sums
    return results, bias_sum


@triton.jit(do_not_specialize=["height", "width", "num_tiles", "tiles_per_program"])
def weight_gradient_kernel(
    gradient,
    slope,
    x,
    partial,
    height,
    width,
    num_tiles,
    tiles_per_program,
    DIM: tl.constexpr,
    KERNEL: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums the gradients to weight and bias over `tiles_per_program` tiles in each program.

    The grid is one-dimensional: blocks of channels change fastest, then programs.

    Args:
        gradient: the gradient to the result of the forward pass: (B, height, width, dim) in memory.
        slope, x: the slope and the input of the forward pass, of the same shape.
        partial: float32 (programs, KERNEL * KERNEL + 1, dim) for the sums; the last row is that of the bias.
        num_tiles: the total number of tiles.
        tiles_per_program: the number of tiles in each program.
        DIM, KERNEL, TILE, ROWS, WHOLE, BLOCK: as for `convolve_kernel`.
    """
    blocks = tl.cdiv(DIM, BLOCK)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    live = channel < DIM
    program = tl.program_id(0) // blocks
    # All KERNEL * KERNEL sums stay in registers over several tiles. For a filter of 7 x 7 that takes 191 registers a
    # thread, without spills (records/LOG.md).
    sums, bias_sum = zeros(KERNEL * KERNEL, BLOCK), tl.zeros([BLOCK], tl.float32)
    for tile in range(program * tiles_per_program, tl.minimum((program + 1) * tiles_per_program, num_tiles)):
        image, top, left = locate_tile(tile, height, width, DIM, TILE, ROWS)
        for row in range(top, tl.minimum(top + ROWS, height)):
            sums, bias_sum = add_row(
                sums, bias_sum, gradient, slope, x, image, row, left, height, width, channel, DIM, KERNEL, TILE, WHOLE
            )
    to = partial + program.to(tl.int64) * (KERNEL * KERNEL + 1) * DIM + channel
    for tap in tl.static_range(KERNEL * KERNEL):
        tl.store(to + tap * DIM, sums[tap], mask=live)
    tl.store(to + KERNEL * KERNEL * DIM, bias_sum, mask=live)
