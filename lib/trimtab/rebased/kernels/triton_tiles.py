"""What the Triton kernels of attention are made of: tiles read and written, features, states."""

from typing import no_type_check

import triton
import triton.language as tl

# The type checker of the tests must not wrap what Triton compiles, hence no_type_check.


@triton.jit
@no_type_check
def _rows_of(x, batch, head, t, time, stride_b, stride_t, stride_h, first, width, WIDTH: tl.constexpr):
    """[CHUNK, WIDTH] of a tensor [batch, time, heads, width] in fp32: tokens t, columns from `first`; 0 beyond."""
    columns = first + tl.arange(0, WIDTH)
    inside = ((t >= 0) & (t < time))[:, None] & (columns < width)[None, :]
    start = x + batch.to(tl.int64) * stride_b + head * stride_h
    return tl.load(start + t.to(tl.int64)[:, None] * stride_t + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _column_of(x, row, t, time):
    """[CHUNK] of a column [batch, heads, time]; 0 beyond."""
    return tl.load(x + row.to(tl.int64) * time + t, mask=(t >= 0) & (t < time), other=0.0)


@triton.jit
@no_type_check
def _seen(seen, row, t, time, SEEN: tl.constexpr):
    """1 for tokens that are there and, where a mask is, seen; else 0."""
    if SEEN:
        return _column_of(seen, row, t, time)
    return (t < time).to(tl.float32)


@triton.jit
@no_type_check
def _dot(a, b, HALF: tl.constexpr):
    if HALF:
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
@no_type_check
def _square(x, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """[CHUNK, WIDTH^2]: x_a x_b."""
    return tl.reshape(x[:, :, None] * x[:, None, :], (CHUNK, WIDTH * WIDTH))


@triton.jit
@no_type_check
def _read_state(states, index, tile, d_v, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Constant [TILE], linear [WIDTH, TILE], square [WIDTH^2, TILE]; and their last columns: 1, [WIDTH], [WIDTH^2]."""
    start = states + index.to(tl.int64) * (1 + WIDTH + WIDTH * WIDTH) * (d_v + 1)
    columns = tile * TILE + tl.arange(0, TILE)
    inside = columns < d_v
    one, two = 1 + tl.arange(0, WIDTH), 1 + WIDTH + tl.arange(0, WIDTH * WIDTH)
    s0 = tl.load(start + columns, mask=inside, other=0.0)
    s1 = tl.load(start + one[:, None] * (d_v + 1) + columns[None, :], mask=inside[None, :], other=0.0)
    s2 = tl.load(start + two[:, None] * (d_v + 1) + columns[None, :], mask=inside[None, :], other=0.0)
    z0, z1, z2 = tl.load(start + d_v), tl.load(start + one * (d_v + 1) + d_v), tl.load(start + two * (d_v + 1) + d_v)
    return s0, s1, s2, z0, z1, z2


@triton.jit
@no_type_check
def _add(
    s0, s1, s2, z0, z1, z2, x, u, last,
    LOWER: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The state with the tokens of a chunk: features of x [CHUNK, WIDTH] times [u, last]."""
    square = _square(x, CHUNK, WIDTH)
    s2 += _dot(tl.trans(square), u, HALF)
    z2 += tl.sum(square * last[:, None], 0)
    if LOWER:
        s1 += _dot(tl.trans(x), u, HALF)
        z1 += tl.sum(x * last[:, None], 0)
        s0 += tl.sum(u, 0)
        z0 += tl.sum(last, 0)
    return s0, s1, s2, z0, z1, z2


@triton.jit
@no_type_check
def _weigh(s, t, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr):
    """(p(s), dp/ds) of products q.k [CHUNK, CHUNK], 0 for pairs that do not see each other; C are of q.k itself."""
    seen = t[None, :] <= t[:, None]
    return tl.where(seen, C0 + (C1 + C2 * s) * s, 0.0), tl.where(seen, C1 + 2 * C2 * s, 0.0)


@triton.jit
@no_type_check
def _chunk_of(
    q, k, v, d_out, seen, inverse, d_z, batch, head, row, tile, t, qb, qt, qh, kb, kt, kh, vb, vt, vh, gb, gt, gh,
    time, d_k, d_v, TILE: tl.constexpr, WIDTH: tl.constexpr, SEEN: tl.constexpr,
):  # fmt: skip
    """What the backward pass reads of a chunk: Q, K, U and its last column, dnum and dz. The last column is counted by
    the first tile alone, for gradients of q and k are summed over tiles."""
    Q = _rows_of(q, batch, head, t, time, qb, qt, qh, 0, d_k, WIDTH)
    K = _rows_of(k, batch, head, t, time, kb, kt, kh, 0, d_k, WIDTH)
    U = _rows_of(v, batch, head, t, time, vb, vt, vh, tile * TILE, d_v, TILE)
    G = _rows_of(d_out, batch, head, t, time, gb, gt, gh, tile * TILE, d_v, TILE)
    G *= _column_of(inverse, row, t, time)[:, None]
    ones = _seen(seen, row, t, time, SEEN)
    if SEEN:
        U *= ones[:, None]
    return Q, K, U, ones, G, tl.where(tile == 0, _column_of(d_z, row, t, time), 0.0)


@triton.jit
@no_type_check
def _fold(
    x, G, last, s1, s2, z1, z2, C1: tl.constexpr, C2: tl.constexpr,
    LOWER: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """[CHUNK, WIDTH]: gradient in x, of whose features [G, last] times the state is the gradient."""
    square = _dot(G, tl.trans(s2), HALF) + last[:, None] * z2[None, :]
    out = 2 * C2 * tl.sum(tl.reshape(square, (CHUNK, WIDTH, WIDTH)) * x[:, None, :], 2)
    if LOWER:
        out += C1 * (_dot(G, tl.trans(s1), HALF) + last[:, None] * z1[None, :])
    return out


@triton.jit
@no_type_check
def _store_part(out, found, tile, batch, head, t, time, heads, d_k, WIDTH: tl.constexpr):
    """out[tile, batch, t, head], contiguous."""
    columns = tl.arange(0, WIDTH)
    batches = tl.num_programs(1) // heads
    rows = ((tile * batches + batch).to(tl.int64) * time + t) * heads + head
    inside = ((t >= 0) & (t < time))[:, None] & (columns < d_k)[None, :]
    tl.store(out + rows[:, None] * d_k + columns[None, :], found, mask=inside)


@triton.jit
@no_type_check
def _take_in(m0, m1, m2, K, ones):
    """The moments sum 1, sum k and sum k k^T, in fp64, with a block of keys."""
    seen = K * ones[:, None]
    return m0 + tl.sum(ones, 0), m1 + tl.sum(seen, 0), m2 + tl.sum(seen[:, :, None] * K[:, None, :], 0)
