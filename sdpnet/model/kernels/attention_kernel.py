"""Attention over short sequences and its gradients, in Triton.

All kernels read queries, keys and values from the packed result of one product, (B, T, 3, H, D) in memory, and write
the results (B, T, H * D) and the gradients (B, T, 3, H, D) in place, so that nothing is copied or transposed in memory.

A program computes one head of one sample; the grid is (B * H,). It keeps all keys and values (or queries and gradients)
of the head in shared memory and computes blocks of rows of scores, one after another. Blocks of Triton have powers of
two, so each dimension is divided:

    columns   FULL tiles of CHUNK, and with TAIL one of TAIL: 201 are 3 x 64 + 16 = 208 instead of 256
    rows      blocks of ROWS; the last one may have rows that do not exist
    channels  D1 and, unless it is 0, D2: 48 are 32 + 16

Everything that does not exist is loaded as 0. The kernels keep scores in float32 and round the weights and the
gradients of the scores to the dtype of the inputs for the products, as flash attention does (Dao, 2023).
"""

# ruff: noqa: RUF005 -- Triton does not support (*values, value)
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attention_forward_kernel", "attention_key_kernel", "attention_query_kernel"]


@triton.jit
def mask_of(rows, channels, T: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, NARROW: tl.constexpr):
    """Which elements exist; None for all. `MASKED` and `NARROW` say whether rows and channels may not exist."""
    if MASKED and NARROW:
        return (rows[:, None] < T) & (channels[None, :] < D)
    elif MASKED:
        return rows[:, None] < T
    else:
        return channels[None, :] < D


@triton.jit
def load_tile(
    source,
    first,
    T: tl.constexpr,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    AT: tl.constexpr,
    W: tl.constexpr,
    N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Loads rows `first` to `first` + N, channels AT to AT + W. With MASKED, there may be fewer rows."""
    rows = first + tl.arange(0, N)
    channels = AT + tl.arange(0, W)
    at = source + rows[:, None] * STRIDE + channels[None, :]
    if MASKED or AT + W > D:
        return tl.load(at, mask=mask_of(rows, channels, T, D, MASKED, AT + W > D), other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_tile(
    target,
    value,
    first,
    T: tl.constexpr,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    AT: tl.constexpr,
    W: tl.constexpr,
    N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Stores what `load_tile` loads."""
    rows = first + tl.arange(0, N)
    channels = AT + tl.arange(0, W)
    at = target + rows[:, None] * STRIDE + channels[None, :]
    value = value.to(target.dtype.element_ty)
    if MASKED or AT + W > D:
        tl.store(at, value, mask=mask_of(rows, channels, T, D, MASKED, AT + W > D))
    else:
        tl.store(at, value)


@triton.jit
def load(
    source,
    first,
    T: tl.constexpr,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Loads N rows as a tuple of their parts."""
    if D2:
        return (
            load_tile(source, first, T, STRIDE, D, 0, D1, N, MASKED),
            load_tile(source, first, T, STRIDE, D, D1, D2, N, MASKED),
        )
    else:
        return (load_tile(source, first, T, STRIDE, D, 0, D1, N, MASKED),)


@triton.jit
def store(
    target,
    parts,
    factor,
    first,
    T: tl.constexpr,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Stores parts times `factor`."""
    store_tile(target, parts[0] * factor, first, T, STRIDE, D, 0, D1, N, MASKED)
    if D2:
        store_tile(target, parts[1] * factor, first, T, STRIDE, D, D1, D2, N, MASKED)


@triton.jit
def load_all(
    source,
    T: tl.constexpr,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    FULL: tl.constexpr,
    CHUNK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Loads all T rows as a tuple of tiles, which are tuples of parts."""
    tiles = ()
    for n in tl.static_range(FULL):
        tiles = tiles + (load(source, n * CHUNK, T, STRIDE, D, D1, D2, CHUNK, (n + 1) * CHUNK > T),)  # type: ignore[assignment]
    if TAIL:
        tiles = tiles + (load(source, FULL * CHUNK, T, STRIDE, D, D1, D2, TAIL, FULL * CHUNK + TAIL > T),)  # type: ignore[assignment]
    return tiles


@triton.jit
def load_row(source, first, T: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr, OTHER: tl.constexpr):
    """Loads N values of `lse` or `delta`. Their rows are padded to a multiple of 16, so that a thread can load two
    neighbours at once."""
    at = first + tl.arange(0, N)
    if MASKED:
        return tl.load(source + at, mask=at < (T + 15) // 16 * 16, other=OTHER)
    else:
        return tl.load(source + at)


@triton.jit
def load_columns(
    source, n: tl.constexpr, T: tl.constexpr, FULL: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr,
    OTHER: tl.constexpr,
):  # fmt: skip
    """Loads the values for tile n."""
    if n < FULL:
        return load_row(source, n * CHUNK, T, CHUNK, (n + 1) * CHUNK > (T + 15) // 16 * 16, OTHER)
    else:
        return load_row(source, n * CHUNK, T, TAIL, n * CHUNK + TAIL > (T + 15) // 16 * 16, OTHER)


@triton.jit
def store_row(target, value, first, T: tl.constexpr, N: tl.constexpr):
    at = first + tl.arange(0, N)
    tl.store(target + at, value, mask=at < (T + 15) // 16 * 16)


@triton.jit
def scores(a, b, D2: tl.constexpr):
    """a (M, D) times the transpose of b (N, D), both as tuples of parts: float32 (M, N)."""
    result = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if D2:
        result = tl.dot(a[1], tl.trans(b[1]), result, input_precision="ieee")
    return result


@triton.jit
def hide(s, first: tl.constexpr, T: tl.constexpr, N: tl.constexpr):
    """Scores with the N keys from `first`; -inf where the key does not exist."""
    if first + N > T:
        return tl.where(first + tl.arange(0, N)[None, :] < T, s, float("-inf"))
    else:
        return s


@triton.jit
def zeros(N: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    if D2:
        return (tl.zeros([N, D1], tl.float32), tl.zeros([N, D2], tl.float32))
    else:
        return (tl.zeros([N, D1], tl.float32),)


@triton.jit
def add_products(a, b, sums, D2: tl.constexpr):
    """sums + a (M, N), rounded, times b (N, D), by parts of D."""
    a = a.to(b[0].dtype)
    if D2:
        return (
            tl.dot(a, b[0], sums[0], input_precision="ieee"),
            tl.dot(a, b[1], sums[1], input_precision="ieee"),
        )
    else:
        return (tl.dot(a, b[0], sums[0], input_precision="ieee"),)


@triton.jit
def inner(a, b, D2: tl.constexpr):
    """The inner products of the rows of a and b: float32 (M,)."""
    result = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if D2:
        result += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return result


@triton.jit
def forward_rows(
    q, k, v, to, lse, first, scale, T: tl.constexpr, H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, FULL: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr, N: tl.constexpr,
    MASKED: tl.constexpr, TRAINING: tl.constexpr,
):  # fmt: skip
    """Computes the results of N queries."""
    rows = load(q, first, T, 3 * H * D, D, D1, D2, N, MASKED)
    tiles = ()
    largest = tl.full([N], float("-inf"), tl.float32)
    for n in tl.static_range(FULL + (1 if TAIL else 0)):
        s = hide(scores(rows, k[n], D2), n * CHUNK, T, CHUNK if n < FULL else TAIL)
        largest = tl.maximum(largest, tl.max(s, 1))
        tiles = tiles + (s,)  # type: ignore[assignment]
    largest *= scale
    total = tl.zeros([N], tl.float32)
    sums = zeros(N, D1, D2)
    for n in tl.static_range(FULL + (1 if TAIL else 0)):
        p = tl.exp2(tiles[n] * scale - largest[:, None])
        total += tl.sum(p, 1)
        sums = add_products(p, v[n], sums, D2)
    store(to, sums, (1.0 / total)[:, None], first, T, H * D, D, D1, D2, N, MASKED)
    if TRAINING:
        store_row(lse, largest + tl.log2(total), first, T, N)


@triton.jit
def attention_forward_kernel(
    qkv, out, lse, scale, T: tl.constexpr, H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    FULL: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, HOIST: tl.constexpr,
    TRAINING: tl.constexpr,
):  # fmt: skip
    """Computes the results, and with TRAINING the logarithms of the softmax's sums.

    Args:
        qkv: (B, T, 3, H, D).
        out: (B, T, H, D), as qkv.
        lse: float32 (B, H, S), where S is T rounded up to a multiple of 16: the binary logarithm of the sum over the
            keys of 2 to the power of the scaled scores. Values from T on have no meaning.
        scale: the factor of the scores times log2(e), which is positive.
        HOIST: whether values that are the same in all iterations of the loop over rows may stay in registers.
    """
    pair = tl.program_id(0).to(tl.int64)
    q = qkv + pair // H * (T * 3 * H * D) + pair % H * D
    to = out + pair // H * (T * H * D) + pair % H * D
    lse += pair * ((T + 15) // 16 * 16)
    k = load_all(q + H * D, T, 3 * H * D, D, D1, D2, FULL, CHUNK, TAIL)
    v = load_all(q + 2 * H * D, T, 3 * H * D, D, D1, D2, FULL, CHUNK, TAIL)
    for first in tl.range(0, T, ROWS, disable_licm=not HOIST):
        forward_rows(
            q, k, v, to, lse, first, scale, T, H, D, D1, D2, FULL, CHUNK, TAIL, ROWS, T % ROWS > 0, TRAINING
        )  # fmt: skip


@triton.jit
def query_rows(
    q, k, v, upstream, results, lse, delta, to, first, scale, gradient_scale, T: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, FULL: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr,
    N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Computes the gradients to N queries, and their `delta`."""
    rows = load(q, first, T, 3 * H * D, D, D1, D2, N, MASKED)
    g = load(upstream, first, T, H * D, D, D1, D2, N, MASKED)
    d = inner(g, load(results, first, T, H * D, D, D1, D2, N, MASKED), D2)
    store_row(delta, d, first, T, N)
    row_lse = load_row(lse, first, T, N, MASKED, float("inf"))
    sums = zeros(N, D1, D2)
    for n in tl.static_range(FULL + (1 if TAIL else 0)):
        s = scores(rows, k[n], D2) * scale - row_lse[:, None]
        # Without `hide`, 0 minus a logarithm could be too large for exp2.
        p = tl.exp2(hide(s, n * CHUNK, T, CHUNK if n < FULL else TAIL))
        sums = add_products(p * (scores(g, v[n], D2) - d[:, None]), k[n], sums, D2)
    store(to, sums, gradient_scale, first, T, 3 * H * D, D, D1, D2, N, MASKED)


@triton.jit
def attention_query_kernel(
    qkv, gradient, out, lse, delta, grad_qkv, scale, gradient_scale, T: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, FULL: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr,
    ROWS: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """Computes the gradients to the queries, and delta.

    Args:
        qkv, out, lse, scale, HOIST: as for `attention_forward_kernel`.
        gradient: the gradient to out, of its shape.
        delta: float32, of the shape of lse: the inner products of the rows of out and of gradient, which are the
            sums of the products of each row's weights and their gradients.
        grad_qkv: of the shape of qkv.
        gradient_scale: the factor of the scores.
    """
    pair = tl.program_id(0).to(tl.int64)
    q = qkv + pair // H * (T * 3 * H * D) + pair % H * D
    to = grad_qkv + pair // H * (T * 3 * H * D) + pair % H * D
    g = gradient + pair // H * (T * H * D) + pair % H * D
    r = out + pair // H * (T * H * D) + pair % H * D
    lse += pair * ((T + 15) // 16 * 16)
    delta += pair * ((T + 15) // 16 * 16)
    k = load_all(q + H * D, T, 3 * H * D, D, D1, D2, FULL, CHUNK, TAIL)
    v = load_all(q + 2 * H * D, T, 3 * H * D, D, D1, D2, FULL, CHUNK, TAIL)
    for first in tl.range(0, T, ROWS, disable_licm=not HOIST):
        query_rows(
            q, k, v, g, r, lse, delta, to, first, scale, gradient_scale, T, H, D, D1, D2, FULL, CHUNK, TAIL, ROWS,
            T % ROWS > 0,
        )  # fmt: skip


@triton.jit
def key_rows(
    q, g, k, v, lse, delta, to, first, scale, gradient_scale, T: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, FULL: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr,
    N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Computes the gradients to N keys and values."""
    keys = load(k, first, T, 3 * H * D, D, D1, D2, N, MASKED)
    values = load(v, first, T, 3 * H * D, D, D1, D2, N, MASKED)
    dk = zeros(N, D1, D2)
    dv = zeros(N, D1, D2)
    for n in tl.static_range(FULL + (1 if TAIL else 0)):
        column_lse = load_columns(lse, n, T, FULL, CHUNK, TAIL, float("inf"))
        p = tl.exp2(scores(keys, q[n], D2) * scale - column_lse[None, :])
        dv = add_products(p, g[n], dv, D2)
        d = load_columns(delta, n, T, FULL, CHUNK, TAIL, 0.0)
        dk = add_products(p * (scores(values, g[n], D2) - d[None, :]), q[n], dk, D2)
    store(to + H * D, dk, gradient_scale, first, T, 3 * H * D, D, D1, D2, N, MASKED)
    store(to + 2 * H * D, dv, 1.0, first, T, 3 * H * D, D, D1, D2, N, MASKED)


@triton.jit
def attention_key_kernel(
    qkv, gradient, lse, delta, grad_qkv, scale, gradient_scale, T: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, FULL: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr,
    ROWS: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """Computes the gradients to keys and values; the scores are (keys, queries) here. See `attention_query_kernel`."""
    pair = tl.program_id(0).to(tl.int64)
    q = qkv + pair // H * (T * 3 * H * D) + pair % H * D
    to = grad_qkv + pair // H * (T * 3 * H * D) + pair % H * D
    upstream = gradient + pair // H * (T * H * D) + pair % H * D
    lse += pair * ((T + 15) // 16 * 16)
    delta += pair * ((T + 15) // 16 * 16)
    queries = load_all(q, T, 3 * H * D, D, D1, D2, FULL, CHUNK, TAIL)
    g = load_all(upstream, T, H * D, D, D1, D2, FULL, CHUNK, TAIL)
    k = q + H * D
    v = q + 2 * H * D
    for first in tl.range(0, T, ROWS, disable_licm=not HOIST):
        key_rows(
            queries, g, k, v, lse, delta, to, first, scale, gradient_scale, T, H, D, D1, D2, FULL, CHUNK, TAIL, ROWS,
            T % ROWS > 0,
        )  # fmt: skip
