"""Attention over short sequences and its gradients, in Triton.

All kernels read queries, keys and values from the packed result of one product, (B, T, 3, H, D) in memory, and write
the results (B, T, H * D) and the gradients (B, T, 3, H, D) in place, so that nothing is copied or transposed in memory.

A program has one sample and one head. It keeps all its keys and values (or queries and gradients) in shared memory as
tiles: FULL tiles of CHUNK rows and, with TAIL, one of TAIL rows. 201 rows are 3 tiles of 64 and one of 16, which is
208 rows instead of the 256 of a single tile. Blocks of Triton have powers of two, so the D channels of a head are D1
and, unless it is 0, D2 channels: 48 are 32 and 16. Everything that does not exist is loaded as 0.

The kernels keep scores in float32 and round the weights and the gradients of the scores to the dtype of the inputs for
the products, as flash attention does (Dao, 2023).
"""

# ruff: noqa: RUF005 -- Triton does not support (*values, value)
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["backward_kernel", "forward_kernel"]


@triton.jit
def load_tile(
    source, first, T: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, AT: tl.constexpr, N: tl.constexpr, W
):
    """Loads rows `first` to `first` + N, channels AT to AT + W."""
    rows = first + tl.arange(0, N)
    channels = AT + tl.arange(0, W)
    live = rows[:, None] < T
    if AT + W > D:
        live = live & (channels[None, :] < D)
    return tl.load(source + rows[:, None] * STRIDE + channels[None, :], mask=live, other=0.0)


@triton.jit
def store_tile(
    target, value, first, T: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, AT: tl.constexpr, N: tl.constexpr, W
):
    """Stores what `load_tile` loads."""
    rows = first + tl.arange(0, N)
    channels = AT + tl.arange(0, W)
    live = rows[:, None] < T
    if AT + W > D:
        live = live & (channels[None, :] < D)
    value = value.to(target.dtype.element_ty)
    tl.store(target + rows[:, None] * STRIDE + channels[None, :], value, mask=live)


@triton.jit
def load_tiles(
    source,
    T: tl.constexpr,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    AT: tl.constexpr,
    W: tl.constexpr,
    FULL: tl.constexpr,
    CHUNK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Loads all T rows, channels AT to AT + W, as a tuple of tiles; an empty one if W is 0."""
    tiles = ()
    if W:
        for n in tl.static_range(FULL):
            tiles = tiles + (load_tile(source, n * CHUNK, T, STRIDE, D, AT, CHUNK, W),)  # type: ignore[assignment]
        if TAIL:
            tiles = tiles + (load_tile(source, FULL * CHUNK, T, STRIDE, D, AT, TAIL, W),)  # type: ignore[assignment]
    return tiles


@triton.jit
def load_row(source, first, T: tl.constexpr, N: tl.constexpr, OTHER: tl.constexpr):
    rows = first + tl.arange(0, N)
    return tl.load(source + rows, mask=rows < T, other=OTHER)


@triton.jit
def dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def add_dot(a, b, sum):
    return tl.dot(a, b, sum, input_precision="ieee")


@triton.jit
def scores(a, b, D2: tl.constexpr):
    """a (M, D) times the transpose of b (N, D), both as tuples of one or two parts: float32 (M, N)."""
    result = dot(a[0], tl.trans(b[0]))
    if D2:
        result = add_dot(a[1], tl.trans(b[1]), result)
    return result


@triton.jit
def tile_of(first, second, n: tl.constexpr, D2: tl.constexpr):
    """Tile n as a tuple of its parts."""
    if D2:
        return (first[n], second[n])
    else:
        return (first[n],)


@triton.jit
def load_parts(
    source,
    first,
    T: tl.constexpr,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    N: tl.constexpr,
):
    """Loads N rows as a tuple of their parts."""
    if D2:
        return (
            load_tile(source, first, T, STRIDE, D, 0, N, D1),
            load_tile(source, first, T, STRIDE, D, D1, N, D2),
        )
    else:
        return (load_tile(source, first, T, STRIDE, D, 0, N, D1),)


@triton.jit
def store_parts(
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
):
    store_tile(target, parts[0] * factor, first, T, STRIDE, D, 0, N, D1)
    if D2:
        store_tile(target, parts[1] * factor, first, T, STRIDE, D, D1, N, D2)


@triton.jit
def zero_parts(N: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    if D2:
        return (tl.zeros([N, D1], tl.float32), tl.zeros([N, D2], tl.float32))
    else:
        return (tl.zeros([N, D1], tl.float32),)


@triton.jit
def add_products(a, b, sums, D2: tl.constexpr):
    """sums + a (M, N) times b (N, D), by parts of D."""
    if D2:
        return (add_dot(a, b[0], sums[0]), add_dot(a, b[1], sums[1]))
    else:
        return (add_dot(a, b[0], sums[0]),)


@triton.jit
def inner(a, b, D2: tl.constexpr):
    """The inner products of the rows of a and b: float32 (M,)."""
    result = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if D2:
        result += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return result


@triton.jit
def forward_kernel(
    qkv,
    out,
    lse,
    scale,
    T: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    FULL: tl.constexpr,
    CHUNK: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    TRAINING: tl.constexpr,
):
    """Computes the results, and with TRAINING the logarithms of the softmax's sums.

    The grid is (B * H * SPLIT,): SPLIT programs share the queries of one head.

    Args:
        qkv: (B, T, 3, H, D).
        out: (B, T, H, D), as qkv.
        lse: float32 (B, H, T): the binary logarithm of the sum over the keys of 2 to the power of the scaled scores.
        scale: the factor of the scores times log2(e).
        ROWS: queries that are computed at a time.
    """
    pair = tl.program_id(0) // SPLIT
    sample = (pair // H).to(tl.int64)
    q = qkv + sample * (T * 3 * H * D) + pair % H * D
    to = out + sample * (T * H * D) + pair % H * D
    k1 = load_tiles(q + H * D, T, 3 * H * D, D, 0, D1, FULL, CHUNK, TAIL)
    k2 = load_tiles(q + H * D, T, 3 * H * D, D, D1, D2, FULL, CHUNK, TAIL)
    v1 = load_tiles(q + 2 * H * D, T, 3 * H * D, D, 0, D1, FULL, CHUNK, TAIL)
    v2 = load_tiles(q + 2 * H * D, T, 3 * H * D, D, D1, D2, FULL, CHUNK, TAIL)
    for first in range(tl.program_id(0) % SPLIT * ROWS, T, SPLIT * ROWS):
        rows = load_parts(q, first, T, 3 * H * D, D, D1, D2, ROWS)
        weights = ()
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        for n in tl.static_range(FULL + (1 if TAIL else 0)):
            s = scores(rows, tile_of(k1, k2, n, D2), D2) * scale
            if (n + 1) * CHUNK > T:
                s = tl.where(n * CHUNK + tl.arange(0, CHUNK if n < FULL else TAIL)[None, :] < T, s, float("-inf"))
            largest = tl.maximum(largest, tl.max(s, 1))
            weights = weights + (s,)  # type: ignore[assignment]
        total = tl.zeros([ROWS], tl.float32)
        sums = zero_parts(ROWS, D1, D2)
        for n in tl.static_range(FULL + (1 if TAIL else 0)):
            p = tl.exp2(weights[n] - largest[:, None])
            total += tl.sum(p, 1)
            sums = add_products(p.to(qkv.dtype.element_ty), tile_of(v1, v2, n, D2), sums, D2)
        store_parts(to, sums, (1.0 / total)[:, None], first, T, H * D, D, D1, D2, ROWS)
        if TRAINING:
            at = first + tl.arange(0, ROWS)
            tl.store(lse + pair.to(tl.int64) * T + at, largest + tl.log2(total), mask=at < T)


@triton.jit
def query_gradients(
    q,
    upstream,
    results,
    lse,
    delta,
    to,
    scale,
    gradient_scale,
    part,
    T: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    FULL: tl.constexpr,
    CHUNK: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Computes the gradients to the queries, by blocks of ROWS queries, and delta."""
    k1 = load_tiles(q + H * D, T, 3 * H * D, D, 0, D1, FULL, CHUNK, TAIL)
    k2 = load_tiles(q + H * D, T, 3 * H * D, D, D1, D2, FULL, CHUNK, TAIL)
    v1 = load_tiles(q + 2 * H * D, T, 3 * H * D, D, 0, D1, FULL, CHUNK, TAIL)
    v2 = load_tiles(q + 2 * H * D, T, 3 * H * D, D, D1, D2, FULL, CHUNK, TAIL)
    for first in range(part * ROWS, T, SPLIT * ROWS):
        rows = load_parts(q, first, T, 3 * H * D, D, D1, D2, ROWS)
        g = load_parts(upstream, first, T, H * D, D, D1, D2, ROWS)
        r = load_parts(results, first, T, H * D, D, D1, D2, ROWS)
        d = inner(g, r, D2)
        at = first + tl.arange(0, ROWS)
        tl.store(delta + at, d, mask=at < T)
        row_lse = load_row(lse, first, T, ROWS, float("inf"))
        sums = zero_parts(ROWS, D1, D2)
        for n in tl.static_range(FULL + (1 if TAIL else 0)):
            keys = tile_of(k1, k2, n, D2)
            s = scores(rows, keys, D2) * scale - row_lse[:, None]
            if (n + 1) * CHUNK > T:  # 0 minus a logarithm may be too large for exp2
                s = tl.where(n * CHUNK + tl.arange(0, CHUNK if n < FULL else TAIL)[None, :] < T, s, float("-inf"))
            p = tl.exp2(s)
            ds = p * (scores(g, tile_of(v1, v2, n, D2), D2) - d[:, None])
            sums = add_products(ds.to(q.dtype.element_ty), keys, sums, D2)
        store_parts(to, sums, gradient_scale, first, T, 3 * H * D, D, D1, D2, ROWS)


@triton.jit
def key_gradients(
    q,
    upstream,
    lse,
    delta,
    to,
    scale,
    gradient_scale,
    part,
    T: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    FULL: tl.constexpr,
    CHUNK: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Computes the gradients to keys and values, by blocks of ROWS keys. The scores are (keys, queries) here."""
    q1 = load_tiles(q, T, 3 * H * D, D, 0, D1, FULL, CHUNK, TAIL)
    q2 = load_tiles(q, T, 3 * H * D, D, D1, D2, FULL, CHUNK, TAIL)
    g1 = load_tiles(upstream, T, H * D, D, 0, D1, FULL, CHUNK, TAIL)
    g2 = load_tiles(upstream, T, H * D, D, D1, D2, FULL, CHUNK, TAIL)
    for first in range(part * ROWS, T, SPLIT * ROWS):
        k = load_parts(q + H * D, first, T, 3 * H * D, D, D1, D2, ROWS)
        v = load_parts(q + 2 * H * D, first, T, 3 * H * D, D, D1, D2, ROWS)
        dk = zero_parts(ROWS, D1, D2)
        dv = zero_parts(ROWS, D1, D2)
        for n in tl.static_range(FULL + (1 if TAIL else 0)):
            queries, g = tile_of(q1, q2, n, D2), tile_of(g1, g2, n, D2)
            column_lse = load_row(lse, n * CHUNK, T, CHUNK if n < FULL else TAIL, float("inf"))
            p = tl.exp2(scores(k, queries, D2) * scale - column_lse[None, :])
            dv = add_products(p.to(q.dtype.element_ty), g, dv, D2)
            d = load_row(delta, n * CHUNK, T, CHUNK if n < FULL else TAIL, 0.0)
            ds = p * (scores(v, g, D2) - d[None, :])
            dk = add_products(ds.to(q.dtype.element_ty), queries, dk, D2)
        store_parts(to + H * D, dk, gradient_scale, first, T, 3 * H * D, D, D1, D2, ROWS)
        store_parts(to + 2 * H * D, dv, 1.0, first, T, 3 * H * D, D, D1, D2, ROWS)


@triton.jit
def all_gradients(
    q,
    upstream,
    results,
    lse,
    to,
    scale,
    gradient_scale,
    T: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    FULL: tl.constexpr,
    CHUNK: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Computes all gradients, by blocks of ROWS queries; those of keys and values are summed in registers."""
    k1 = load_tiles(q + H * D, T, 3 * H * D, D, 0, D1, FULL, CHUNK, TAIL)
    k2 = load_tiles(q + H * D, T, 3 * H * D, D, D1, D2, FULL, CHUNK, TAIL)
    v1 = load_tiles(q + 2 * H * D, T, 3 * H * D, D, 0, D1, FULL, CHUNK, TAIL)
    v2 = load_tiles(q + 2 * H * D, T, 3 * H * D, D, D1, D2, FULL, CHUNK, TAIL)
    dk = ()
    dv = ()
    for n in tl.static_range(FULL + (1 if TAIL else 0)):
        dk = dk + (zero_parts(CHUNK if n < FULL else TAIL, D1, D2),)  # type: ignore[assignment]
        dv = dv + (zero_parts(CHUNK if n < FULL else TAIL, D1, D2),)  # type: ignore[assignment]
    for first in range(0, T, ROWS):
        rows = load_parts(q, first, T, 3 * H * D, D, D1, D2, ROWS)
        g = load_parts(upstream, first, T, H * D, D, D1, D2, ROWS)
        r = load_parts(results, first, T, H * D, D, D1, D2, ROWS)
        d = inner(g, r, D2)
        row_lse = load_row(lse, first, T, ROWS, float("inf"))
        dq = zero_parts(ROWS, D1, D2)
        for n in tl.static_range(FULL + (1 if TAIL else 0)):
            keys = tile_of(k1, k2, n, D2)
            s = scores(keys, rows, D2) * scale - row_lse[None, :]
            if (n + 1) * CHUNK > T:
                s = tl.where(n * CHUNK + tl.arange(0, CHUNK if n < FULL else TAIL)[:, None] < T, s, float("-inf"))
            p = tl.exp2(s)
            dv = dv[:n] + (add_products(p.to(q.dtype.element_ty), g, dv[n], D2),) + dv[n + 1 :]
            ds = (p * (scores(tile_of(v1, v2, n, D2), g, D2) - d[None, :])).to(q.dtype.element_ty)
            dk = dk[:n] + (add_products(ds, rows, dk[n], D2),) + dk[n + 1 :]
            dq = add_products(tl.trans(ds), keys, dq, D2)
        store_parts(to, dq, gradient_scale, first, T, 3 * H * D, D, D1, D2, ROWS)
    for n in tl.static_range(FULL + (1 if TAIL else 0)):
        to_k, to_v = to + H * D, to + 2 * H * D
        store_parts(to_k, dk[n], gradient_scale, n * CHUNK, T, 3 * H * D, D, D1, D2, CHUNK if n < FULL else TAIL)
        store_parts(to_v, dv[n], 1.0, n * CHUNK, T, 3 * H * D, D, D1, D2, CHUNK if n < FULL else TAIL)


@triton.jit
def backward_kernel(
    qkv,
    gradient,
    out,
    lse,
    delta,
    grad_qkv,
    scale,
    gradient_scale,
    T: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    FULL: tl.constexpr,
    CHUNK: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    FORM: tl.constexpr,
):
    """Computes the gradients. The grid is (B * H * SPLIT,), as for `forward_kernel`.

    Args:
        qkv, out, lse: as for `forward_kernel`.
        gradient: the gradient to out, of its shape.
        delta: float32 (B, H, T): the inner products of the rows of out and of gradient, which sum the products of
            each row's weights and their gradients. FORM "queries" writes it, and "keys" reads it.
        grad_qkv: of the shape of qkv.
        gradient_scale: the factor of the scores.
        FORM: "queries" for the gradients to queries; "keys" for those to keys and values; "phases" for the former, then
            the latter (SPLIT is 1); "whole" for all of them at once (SPLIT is 1).
    """
    pair = tl.program_id(0) // SPLIT
    part = tl.program_id(0) % SPLIT
    sample = (pair // H).to(tl.int64)
    q = qkv + sample * (T * 3 * H * D) + pair % H * D
    to = grad_qkv + sample * (T * 3 * H * D) + pair % H * D
    upstream = gradient + sample * (T * H * D) + pair % H * D
    results = out + sample * (T * H * D) + pair % H * D
    lse += pair.to(tl.int64) * T
    delta += pair.to(tl.int64) * T
    if FORM == "whole":
        all_gradients(q, upstream, results, lse, to, scale, gradient_scale, T, H, D, D1, D2, FULL, CHUNK, TAIL, ROWS)
    if FORM == "queries" or FORM == "phases":
        query_gradients(
            q,
            upstream,
            results,
            lse,
            delta,
            to,
            scale,
            gradient_scale,
            part,
            T,
            H,
            D,
            D1,
            D2,
            FULL,
            CHUNK,
            TAIL,
            ROWS,
            SPLIT,
        )
    if FORM == "phases":
        tl.debug_barrier()  # the threads of a program read what others of them have written to delta
    if FORM == "keys" or FORM == "phases":
        key_gradients(
            q, upstream, lse, delta, to, scale, gradient_scale, part, T, H, D, D1, D2, FULL, CHUNK, TAIL, ROWS, SPLIT
        )
