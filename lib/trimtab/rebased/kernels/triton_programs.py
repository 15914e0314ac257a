"""The six Triton programs of attention; see `triton` for how they go together."""

from typing import no_type_check

import triton
import triton.language as tl

from trimtab.rebased.kernels.triton_tiles import (
    _add,
    _chunk_of,
    _column_of,
    _dot,
    _fold,
    _read_state,
    _rows_of,
    _seen,
    _square,
    _store_part,
    _take_in,
    _weigh,
)

# The type checker of the tests must not wrap what Triton compiles, hence no_type_check.


@triton.jit
@no_type_check
def _sum_states(
    x, u, by, last, sums, xb, xt, xh, ub, ut, uh, time, heads, d_k, d_v,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, LOWER: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr,
    TILE: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, SEEN: tl.constexpr,
):  # fmt: skip
    """sums[row, span]: the unweighted state of one span's tokens. SEEN: whether `by` and `last` are there."""
    span, row, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = row // heads, row % heads
    s0, s1 = tl.zeros([TILE], tl.float32), tl.zeros([WIDTH, TILE], tl.float32)
    s2, z2 = tl.zeros([WIDTH * WIDTH, TILE], tl.float32), tl.zeros([WIDTH * WIDTH], tl.float32)
    z0, z1 = 0.0, tl.zeros([WIDTH], tl.float32)
    for chunk in range(0, SPAN, CHUNK):
        t = span * SPAN + chunk + tl.arange(0, CHUNK)
        X = _rows_of(x, batch, head, t, time, xb, xt, xh, 0, d_k, WIDTH)
        U = _rows_of(u, batch, head, t, time, ub, ut, uh, tile * TILE, d_v, TILE)
        if SEEN:
            U *= _column_of(by, row, t, time)[:, None]
            ones = _column_of(last, row, t, time)
        else:
            ones = (t < time).to(tl.float32)
        s0, s1, s2, z0, z1, z2 = _add(s0, s1, s2, z0, z1, z2, X, U, ones, LOWER, CHUNK, WIDTH, HALF)
    start = sums + (row * tl.num_programs(0) + span).to(tl.int64) * (1 + WIDTH + WIDTH * WIDTH) * (d_v + 1)
    columns = tile * TILE + tl.arange(0, TILE)
    inside = columns < d_v
    one, two = 1 + tl.arange(0, WIDTH), 1 + WIDTH + tl.arange(0, WIDTH * WIDTH)
    tl.store(start + columns, s0, mask=inside)
    tl.store(start + one[:, None] * (d_v + 1) + columns[None, :], s1, mask=inside[None, :])
    tl.store(start + two[:, None] * (d_v + 1) + columns[None, :], s2, mask=inside[None, :])
    if tile == 0:
        tl.store(start + d_v, z0)
        tl.store(start + one * (d_v + 1) + d_v, z1)
        tl.store(start + two * (d_v + 1) + d_v, z2)


@triton.jit
@no_type_check
def _outputs(
    q, k, v, out, states, inverse, seen, qb, qt, qh, kb, kt, kh, vb, vt, vh, ob, ot, oh, time, heads, d_k, d_v,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, LOWER: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr,
    TILE: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, SEEN: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """out of one span, whose state before it is states[row, span]."""
    span, row, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = row // heads, row % heads
    s0, s1, s2, z0, z1, z2 = _read_state(states, row * tl.num_programs(0) + span, tile, d_v, TILE, WIDTH)
    for chunk in range(0, SPAN, CHUNK):
        t = span * SPAN + chunk + tl.arange(0, CHUNK)
        Q = _rows_of(q, batch, head, t, time, qb, qt, qh, 0, d_k, WIDTH)
        square = _square(Q, CHUNK, WIDTH)
        total = C2 * _dot(square, s2, HALF)
        if LOWER:
            total += C1 * _dot(Q, s1, HALF) + C0 * s0[None, :]
        if CAUSAL:
            K = _rows_of(k, batch, head, t, time, kb, kt, kh, 0, d_k, WIDTH)
            U = _rows_of(v, batch, head, t, time, vb, vt, vh, tile * TILE, d_v, TILE)
            ones = _seen(seen, row, t, time, SEEN)
            if SEEN:
                U *= ones[:, None]
            p, _ = _weigh(_dot(Q, tl.trans(K), HALF), t, C0, C1, C2)
            total += _dot(p, U, HALF)
            s0, s1, s2, z0, z1, z2 = _add(s0, s1, s2, z0, z1, z2, K, U, ones, LOWER, CHUNK, WIDTH, HALF)
        over = _column_of(inverse, row, t, time)
        columns = tile * TILE + tl.arange(0, TILE)
        inside = (t < time)[:, None] & (columns < d_v)[None, :]
        start = out + batch.to(tl.int64) * ob + head * oh
        tl.store(start + t.to(tl.int64)[:, None] * ot + columns[None, :], total * over[:, None], mask=inside)


@triton.jit
@no_type_check
def _sum_moments(
    k, moments, seen, kb, kt, kh, time, heads, d_k, SPAN: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    SEEN: tl.constexpr,
):  # fmt: skip
    """moments[row, span]: sum 1, sum k and sum k k^T over one span's keys, in fp64."""
    span, row = tl.program_id(0), tl.program_id(1)
    m0, m1 = tl.zeros([1], tl.float64), tl.zeros([WIDTH], tl.float64)
    m2 = tl.zeros([WIDTH, WIDTH], tl.float64)
    for block in range(0, SPAN, BLOCK):
        t = span * SPAN + block + tl.arange(0, BLOCK)
        K = _rows_of(k, row // heads, row % heads, t, time, kb, kt, kh, 0, d_k, WIDTH).to(tl.float64)
        m0, m1, m2 = _take_in(m0, m1, m2, K, _seen(seen, row, t, time, SEEN).to(tl.float64))
    start = moments + (row * tl.num_programs(0) + span).to(tl.int64) * (1 + WIDTH + WIDTH * WIDTH)
    one = tl.arange(0, WIDTH)
    tl.store(start + tl.arange(0, 1), m0)
    tl.store(start + 1 + one, m1)
    tl.store(start + 1 + WIDTH + one[:, None] * WIDTH + one[None, :], m2)


@triton.jit
@no_type_check
def _denominators(
    q, k, moments, seen, z, bound, qb, qt, qh, kb, kt, kh, time, heads, d_k,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    SEEN: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """z and its bound of one span's tokens in fp64, whose moments before it are moments[row, span]."""
    span, row = tl.program_id(0), tl.program_id(1)
    start = moments + (row * tl.num_programs(0) + span).to(tl.int64) * (1 + WIDTH + WIDTH * WIDTH)
    one = tl.arange(0, WIDTH)
    m0, m1 = tl.load(start + tl.arange(0, 1)), tl.load(start + 1 + one)
    m2 = tl.load(start + 1 + WIDTH + one[:, None] * WIDTH + one[None, :])
    root0, root2 = tl.sqrt(C0 + tl.zeros([1], tl.float64)), tl.sqrt(C2 + tl.zeros([1], tl.float64))
    for block in range(0, SPAN, BLOCK):
        t = span * SPAN + block + tl.arange(0, BLOCK)
        Q = _rows_of(q, row // heads, row % heads, t, time, qb, qt, qh, 0, d_k, WIDTH).to(tl.float64)
        sums = C2 * tl.sum(tl.sum(Q[:, :, None] * m2[None, :, :], 1) * Q, 1)
        sums += C1 * tl.sum(Q * m1[None, :], 1) + C0 * m0
        trace = tl.sum(tl.sum(tl.where(one[:, None] == one[None, :], m2, 0.0), 1), 0)
        sizes = root0 * m0 + root2 * trace + tl.zeros([BLOCK], tl.float64)
        if CAUSAL:
            K = _rows_of(k, row // heads, row % heads, t, time, kb, kt, kh, 0, d_k, WIDTH).to(tl.float64)
            ones = _seen(seen, row, t, time, SEEN).to(tl.float64)
            p, _ = _weigh(tl.sum(Q[:, None, :] * K[None, :, :], 2), t, C0, C1, C2)
            sums += tl.sum(p * ones[None, :], 1)
            sizes += tl.cumsum((root0 + root2 * tl.sum(K * K, 1)) * ones, 0)
            m0, m1, m2 = _take_in(m0, m1, m2, K, ones)
        at = row.to(tl.int64) * time + t
        tl.store(z + at, sums, mask=t < time)
        tl.store(bound + at, (root0 + root2 * tl.sum(Q * Q, 1)) * sizes, mask=t < time)


@triton.jit
@no_type_check
def _query_gradients(
    q, k, v, d_out, seen, inverse, d_z, states, d_q, qb, qt, qh, kb, kt, kh, vb, vt, vh, gb, gt, gh,
    time, heads, d_k, d_v,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, LOWER: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr,
    TILE: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, SEEN: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """d_q[tile] of one span, walking up from the state before it."""
    span, row, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = row // heads, row % heads
    s0, s1, s2, z0, z1, z2 = _read_state(states, row * tl.num_programs(0) + span, tile, d_v, TILE, WIDTH)
    for chunk in range(0, SPAN, CHUNK):
        t = span * SPAN + chunk + tl.arange(0, CHUNK)
        Q, K, U, ones, G, last = _chunk_of(
            q, k, v, d_out, seen, inverse, d_z, batch, head, row, tile, t, qb, qt, qh, kb, kt, kh, vb, vt, vh,
            gb, gt, gh, time, d_k, d_v, TILE, WIDTH, SEEN,
        )  # fmt: skip
        found = _fold(Q, G, last, s1, s2, z1, z2, C1, C2, LOWER, CHUNK, WIDTH, HALF)
        if CAUSAL:
            _, slope = _weigh(_dot(Q, tl.trans(K), HALF), t, C0, C1, C2)
            d_s = slope * (_dot(G, tl.trans(U), HALF) + last[:, None] * ones[None, :])
            found += _dot(d_s, K, HALF)
            s0, s1, s2, z0, z1, z2 = _add(s0, s1, s2, z0, z1, z2, K, U, ones, LOWER, CHUNK, WIDTH, HALF)
        _store_part(d_q, found, tile, batch, head, t, time, heads, d_k, WIDTH)


@triton.jit
@no_type_check
def _key_gradients(
    q, k, v, d_out, seen, inverse, d_z, states, d_k_parts, d_v_out, qb, qt, qh, kb, kt, kh, vb, vt, vh, gb, gt, gh,
    time, heads, d_k, d_v,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, LOWER: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr,
    TILE: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, SEEN: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """d_k[tile] and d_v of one span, walking down from the state after it."""
    span, row, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = row // heads, row % heads
    s0, s1, s2, z0, z1, z2 = _read_state(states, row * tl.num_programs(0) + span, tile, d_v, TILE, WIDTH)
    for back in range(CHUNK, SPAN + 1, CHUNK):
        t = span * SPAN + SPAN - back + tl.arange(0, CHUNK)
        Q, K, U, ones, G, last = _chunk_of(
            q, k, v, d_out, seen, inverse, d_z, batch, head, row, tile, t, qb, qt, qh, kb, kt, kh, vb, vt, vh,
            gb, gt, gh, time, d_k, d_v, TILE, WIDTH, SEEN,
        )  # fmt: skip
        counted = tl.where(tile == 0, ones, 0.0)
        found = _fold(K, U, counted, s1, s2, z1, z2, C1, C2, LOWER, CHUNK, WIDTH, HALF)
        d_u = C2 * _dot(_square(K, CHUNK, WIDTH), s2, HALF)
        if LOWER:
            d_u += C1 * _dot(K, s1, HALF) + C0 * s0[None, :]
        if CAUSAL:
            p, slope = _weigh(_dot(Q, tl.trans(K), HALF), t, C0, C1, C2)
            d_s = slope * (_dot(G, tl.trans(U), HALF) + last[:, None] * ones[None, :])
            found += _dot(tl.trans(d_s), Q, HALF)
            d_u += _dot(tl.trans(p), G, HALF)
            s0, s1, s2, z0, z1, z2 = _add(s0, s1, s2, z0, z1, z2, Q, G, last, LOWER, CHUNK, WIDTH, HALF)
        if SEEN:
            d_u *= ones[:, None]
        _store_part(d_k_parts, found, tile, batch, head, t, time, heads, d_k, WIDTH)
        columns = tile * TILE + tl.arange(0, TILE)
        rows = (batch.to(tl.int64) * time + t) * heads + head
        inside = (t < time)[:, None] & (columns < d_v)[None, :]
        tl.store(d_v_out + rows[:, None] * d_v + columns[None, :], d_u, mask=inside)
