"""Batch normalisation of rows of channels in Triton, with GELU before it and a residual sum after it.

A tensor is (rows, DIM) in memory: a channels-last image is one with a row for each pixel. Programs are numbered in one
dimension: blocks of CHANNELS channels change fastest, then runs of `rows_per_program` rows. A program goes through its
rows ROWS at a time and keeps sums for each element of such a tile, which are added up at its end. No sum is therefore
long, and equal inputs give equal bits.

With GELU, `values` are what GELU is applied to. GELU is computed again wherever it is needed, because that takes less
time than writing its result and reading it again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sdpnet.model.kernels.gelu_kernel import below_and_density, gelu

__all__ = [
    "batch_norm_apply_kernel",
    "batch_norm_backward_kernel",
    "batch_norm_finish_kernel",
    "batch_norm_statistics_kernel",
    "batch_norm_sums_kernel",
]


@triton.jit
def locate(rows_per_program, num_rows, DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """The program's channels, and its first and last row."""
    blocks: tl.constexpr = (DIM + CHANNELS - 1) // CHANNELS
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.program_id(0) // blocks * rows_per_program
    return channel, first, tl.minimum(first + rows_per_program, num_rows)


@triton.jit
def within(row, last, channel, DIM: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """The mask of a tile from `row` on, without rows from `last` on and channels from DIM on.

    Triton's interpreter would make integers of the conjunction of two masks, so there is a single comparison.
    """
    rows = row + tl.arange(0, ROWS)
    if DIM % CHANNELS == 0:
        ends = tl.zeros([CHANNELS], tl.int32) + last
    else:
        ends = tl.where(channel < DIM, last, 0)
    return rows[:, None] < ends[None, :]


@triton.jit
def load_tile(source, row, channel, inside, DIM: tl.constexpr, ROWS: tl.constexpr):
    """A tile as float32. The offset of the first row has 64 bits; offsets inside of the tile have 32."""
    offsets = tl.arange(0, ROWS)[:, None] * DIM + channel[None, :]
    return tl.load(source + tl.cast(row, tl.int64) * DIM + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(to, row, channel, inside, value, DIM: tl.constexpr, ROWS: tl.constexpr):
    offsets = tl.arange(0, ROWS)[:, None] * DIM + channel[None, :]
    tl.store(to + tl.cast(row, tl.int64) * DIM + offsets, value.to(to.dtype.element_ty), mask=inside)


@triton.jit
def load_channels(source, channel, DIM: tl.constexpr):
    return tl.load(source + channel, mask=channel < DIM, other=0.0).to(tl.float32)


@triton.jit
def load_factors(factor, row, last, pixels, ROWS: tl.constexpr):
    """The factors of the samples that a tile's rows belong to, as (ROWS, 1)."""
    rows = row + tl.arange(0, ROWS)
    return tl.load(factor + rows // pixels, mask=rows < last, other=0.0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["num_rows", "rows_per_program"])
def batch_norm_statistics_kernel(
    values,
    partial,
    num_rows,
    rows_per_program,
    GELU: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sums the distances from the first row's value, and their squares, over the rows of each program.

    The first row's value is near to the mean where the mean is large beside the deviation, so the variance that follows
    from these sums keeps its digits.

    Args:
        values: (num_rows, DIM).
        partial: float32 (programs, 2, DIM) for the sums.
    """
    channel, first, last = locate(rows_per_program, num_rows, DIM, CHANNELS)
    shift = load_channels(values, channel, DIM)
    if GELU:
        shift = gelu(shift)
    sums, squares = tl.zeros([ROWS, CHANNELS], tl.float32), tl.zeros([ROWS, CHANNELS], tl.float32)
    for row in range(first, last, ROWS):
        inside = within(row, last, channel, DIM, ROWS, CHANNELS)
        value = load_tile(values, row, channel, inside, DIM, ROWS)
        if GELU:
            value = gelu(value)
        distance = tl.where(inside, value - shift[None, :], 0.0)
        sums += distance
        squares += distance * distance
    to = partial + (first // rows_per_program).to(tl.int64) * 2 * DIM + channel
    tl.store(to, tl.sum(sums, axis=0), mask=channel < DIM)
    tl.store(to + DIM, tl.sum(squares, axis=0), mask=channel < DIM)


@triton.jit(do_not_specialize=["num_rows", "programs"])
def batch_norm_finish_kernel(
    values,
    partial,
    statistics,
    num_rows,
    programs,
    eps,
    GELU: tl.constexpr,
    DIM: tl.constexpr,
    PROGRAMS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Makes statistics of the sums of `batch_norm_statistics_kernel`. A program computes CHANNELS channels.

    Args:
        values, GELU: as for `batch_norm_statistics_kernel`.
        partial: the sums.
        statistics: float32 (3, DIM): mean, 1 / sqrt(variance + eps), and the variance (biased).
        PROGRAMS: the number of partial sums that are loaded together.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    sums, squares = tl.zeros([PROGRAMS, CHANNELS], tl.float32), tl.zeros([PROGRAMS, CHANNELS], tl.float32)
    for program in range(0, programs, PROGRAMS):
        number = program + tl.arange(0, PROGRAMS)
        inside = number[:, None] < tl.where(channel < DIM, programs, 0)[None, :]
        source = partial + number[:, None] * 2 * DIM + channel[None, :]
        sums += tl.load(source, mask=inside, other=0.0)
        squares += tl.load(source + DIM, mask=inside, other=0.0)
    shift = load_channels(values, channel, DIM)
    if GELU:
        shift = gelu(shift)
    distance = tl.sum(sums, axis=0) / num_rows
    variance = tl.maximum(tl.sum(squares, axis=0) / num_rows - distance * distance, 0.0)
    live = channel < DIM
    tl.store(statistics + channel, shift + distance, mask=live)
    tl.store(statistics + DIM + channel, 1.0 / tl.sqrt(variance + eps), mask=live)
    tl.store(statistics + 2 * DIM + channel, variance, mask=live)


@triton.jit(do_not_specialize=["num_rows", "rows_per_program", "pixels"])
def batch_norm_apply_kernel(
    values,
    residual,
    factor,
    statistics,
    weight,
    bias,
    out,
    num_rows,
    rows_per_program,
    pixels,
    GELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FACTOR: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Computes out = residual + factor * ((values - mean) / deviation * weight + bias).

    Args:
        values, residual, out: (num_rows, DIM); residual with RESIDUAL only.
        factor: with FACTOR, one for each sample of `pixels` rows.
        statistics: of `batch_norm_finish_kernel`.
        weight, bias: (DIM,).
    """
    channel, first, last = locate(rows_per_program, num_rows, DIM, CHANNELS)
    scale = load_channels(statistics + DIM, channel, DIM) * load_channels(weight, channel, DIM)
    mean, offset = load_channels(statistics, channel, DIM), load_channels(bias, channel, DIM)
    for row in range(first, last, ROWS):
        inside = within(row, last, channel, DIM, ROWS, CHANNELS)
        value = load_tile(values, row, channel, inside, DIM, ROWS)
        if GELU:
            value = gelu(value)
        value = (value - mean[None, :]) * scale[None, :] + offset[None, :]
        if FACTOR:
            value *= load_factors(factor, row, last, pixels, ROWS)
        if RESIDUAL:
            value += load_tile(residual, row, channel, inside, DIM, ROWS)
        store_tile(out, row, channel, inside, value, DIM, ROWS)


@triton.jit(do_not_specialize=["num_rows", "rows_per_program", "pixels"])
def batch_norm_sums_kernel(
    gradient,
    values,
    factor,
    statistics,
    partial,
    num_rows,
    rows_per_program,
    pixels,
    GELU: tl.constexpr,
    FACTOR: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sums the gradient, and the gradient times the normalised values, over the rows of each program.

    Args:
        gradient: (num_rows, DIM), to the result of `batch_norm_apply_kernel`.
        partial: float32 (programs, 2, DIM) for the sums, which are the gradients to bias and weight.
        The others are those of `batch_norm_apply_kernel`.
    """
    channel, first, last = locate(rows_per_program, num_rows, DIM, CHANNELS)
    mean, inverse = load_channels(statistics, channel, DIM), load_channels(statistics + DIM, channel, DIM)
    sums, products = tl.zeros([ROWS, CHANNELS], tl.float32), tl.zeros([ROWS, CHANNELS], tl.float32)
    for row in range(first, last, ROWS):
        inside = within(row, last, channel, DIM, ROWS, CHANNELS)
        upstream = load_tile(gradient, row, channel, inside, DIM, ROWS)  # 0 outside
        if FACTOR:
            upstream *= load_factors(factor, row, last, pixels, ROWS)
        value = load_tile(values, row, channel, inside, DIM, ROWS)
        if GELU:
            value = gelu(value)
        sums += upstream
        products += upstream * (value - mean[None, :])
    to = partial + (first // rows_per_program).to(tl.int64) * 2 * DIM + channel
    tl.store(to, tl.sum(sums, axis=0), mask=channel < DIM)
    tl.store(to + DIM, tl.sum(products, axis=0) * inverse, mask=channel < DIM)


@triton.jit(do_not_specialize=["num_rows", "rows_per_program", "pixels"])
def batch_norm_backward_kernel(
    gradient,
    values,
    factor,
    statistics,
    weight,
    sums,
    out,
    partial,
    num_rows,
    rows_per_program,
    pixels,
    GELU: tl.constexpr,
    FACTOR: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Computes the gradient to `values` of `batch_norm_apply_kernel` and, with GELU, its sums over a program's rows.

    Args:
        sums: float32 (2, DIM): those of `batch_norm_sums_kernel` over all programs.
        out: (num_rows, DIM) for the gradient.
        partial: with GELU, float32 (programs, DIM) for the sums, which are the gradient to a bias inside of GELU.
        The others are those of `batch_norm_sums_kernel`.
    """
    channel, first, last = locate(rows_per_program, num_rows, DIM, CHANNELS)
    mean, inverse = load_channels(statistics, channel, DIM), load_channels(statistics + DIM, channel, DIM)
    scale = inverse * load_channels(weight, channel, DIM)
    # The gradient is scale * (upstream - sum / rows - normalised * product / rows), which is linear in upstream and
    # value: all that depends on the channel alone is computed once.
    slope = -scale * inverse * load_channels(sums + DIM, channel, DIM) / num_rows
    offset = -scale * load_channels(sums, channel, DIM) / num_rows
    if GELU:
        total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for row in range(first, last, ROWS):
        inside = within(row, last, channel, DIM, ROWS, CHANNELS)
        upstream = load_tile(gradient, row, channel, inside, DIM, ROWS)
        if FACTOR:
            upstream *= load_factors(factor, row, last, pixels, ROWS)
        value = load_tile(values, row, channel, inside, DIM, ROWS)
        if GELU:
            below, density = below_and_density(value)
            result = scale[None, :] * upstream + slope[None, :] * (value * below - mean[None, :]) + offset[None, :]
            result *= below + value * density
            total += tl.where(inside, result, 0.0)
        else:
            result = scale[None, :] * upstream + slope[None, :] * (value - mean[None, :]) + offset[None, :]
        store_tile(out, row, channel, inside, result, DIM, ROWS)
    if GELU:
        to = partial + (first // rows_per_program).to(tl.int64) * DIM + channel
        tl.store(to, tl.sum(total, axis=0), mask=channel < DIM)
