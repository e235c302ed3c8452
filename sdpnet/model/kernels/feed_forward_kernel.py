"""Bias, GELU and dropout of the feed-forward part in one pass over the hidden layer, and their gradients, in Triton.

Both kernels read and write memory as fast as it goes. A thread has 8 neighbouring columns of ROWS rows, so in half
precision each load and store is 16 bytes, and the loads of all rows are in flight at once. With EVEN, the columns fill
all blocks; masks of columns would make each element a load of its own.

The mask of dropout is the hash of `sdpnet.model.dropout`, computed again in the backward pass.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sdpnet.model.kernels.gelu_kernel import gelu, scaled_slope

__all__ = ["gelu_dropout_backward_kernel", "gelu_dropout_kernel"]


@triton.jit
def within(row, end, column, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """The mask of a tile: rows below `end`, columns below WIDTH. It has one column with EVEN.

    Triton's interpreter would make integers of the conjunction of two masks, so there is a single comparison.
    """
    return (row < end)[:, None] if EVEN else column[None, :] < tl.where(row < end, WIDTH, 0)[:, None]


@triton.jit
def kept(row_key, column_key, threshold):
    """The elements that dropout keeps: bool (rows, columns)."""
    value = (row_key[:, None] ^ column_key[None, :]) * 0x7FEB352D
    value = (value ^ ((value >> 15) & 0x1FFFF)) * -0x7B935975  # the lower 32 bits of a product with 0x846CA68B
    return value >= threshold


@triton.jit(do_not_specialize=["num_rows", "threshold", "scale"])
def gelu_dropout_kernel(
    hidden,
    bias,
    row_keys,
    column_keys,
    out,
    num_rows,
    threshold,
    scale,
    WIDTH: tl.constexpr,
    DROPS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = dropout(GELU(hidden + bias)) for a tile of ROWS rows and BLOCK columns.

    The grid is one-dimensional: blocks of columns change fastest.

    Args:
        hidden, out: (num_rows, WIDTH) in memory.
        bias: (WIDTH,).
        row_keys, column_keys: int32 (num_rows,) and (WIDTH,); used with DROPS only.
        threshold: the hash below which an element is dropped; used with DROPS only.
        scale: the factor of all other elements; used with DROPS only.
    """
    blocks = tl.cdiv(WIDTH, BLOCK)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    inside = within(row, num_rows, column, WIDTH, EVEN)
    at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    value = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    value = gelu(value)
    if DROPS:
        row_key = tl.load(row_keys + row, mask=row < num_rows, other=0)
        column_key = tl.load(column_keys + column, mask=column < WIDTH, other=0)
        # A selection of `value` would be made after the conversion to half precision, with more instructions.
        value *= tl.where(kept(row_key, column_key, threshold), scale, 0.0)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "part_rows", "threshold", "scale", "log_scale"])
def gelu_dropout_backward_kernel(
    gradient,
    hidden,
    bias,
    row_keys,
    column_keys,
    out,
    partial,
    num_rows,
    part_rows,
    threshold,
    scale,
    log_scale,
    WIDTH: tl.constexpr,
    DROPS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient to `hidden`, and its sums over the rows of each part.

    The grid is one-dimensional: blocks of columns change fastest, then parts of the rows. A part has
    `part_rows` rows.

    Args:
        gradient: the gradient to the result of the forward pass, (num_rows, WIDTH) in memory.
        out: the gradient to `hidden`, (num_rows, WIDTH).
        partial: float32 (parts, WIDTH).
        scale, log_scale: the factor of the elements that are kept (1 without DROPS), and its logarithm to the base 2.
    """
    blocks = tl.cdiv(WIDTH, BLOCK)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(0) // blocks
    begin = part * part_rows
    end = tl.minimum(begin + part_rows, num_rows)
    live = column < WIDTH
    bias_value = tl.load(bias + column, mask=live, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = within(row, end, column, WIDTH, EVEN)
        at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        loaded = tl.load(hidden + at, mask=inside, other=0.0)
        slope = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        slope *= scaled_slope(loaded.to(tl.float32) + bias_value[None, :], scale, log_scale)
        if DROPS:
            row_key = tl.load(row_keys + row, mask=row < end, other=0)
            column_key = tl.load(column_keys + column, mask=live, other=0)
            slope = tl.where(kept(row_key, column_key, threshold), slope, 0.0)
        total += slope
        tl.store(out + at, slope.to(out.dtype.element_ty), mask=inside)
    tl.store(partial + part.to(tl.int64) * WIDTH + column, tl.sum(total, axis=0), mask=live)
