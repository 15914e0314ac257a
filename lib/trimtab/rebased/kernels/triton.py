"""Polynomial attention on a GPU: linear in time, features made in registers, division inside, nothing added atomically.

The sequence is cut into spans, spans into chunks. One program per span sums its tokens' state (`_sum_states`); a
cumulative sum over spans gives the state before each; then one program per span walks its chunks with that state in
registers (`_outputs`). Backwards the same kernel sums phi(q_i) [dnum_i, dz_i], see `chunk`, the cumulative sum runs the
other way, `_query_gradients` walks up and `_key_gradients` down. Tensors are read where they are, [batch, time, heads,
width] with any strides but the last.

In memory a state has a row for the constant, d_k for the linear and d_k^2 for the square's features, unweighted: whole
squares suit the tensor cores better than the triangle. Its last column belongs to z. Operands of products are bf16 for
16-bit inputs, sums and states fp32.
"""

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.errors import InputError
from trimtab.rebased.kernels.naive import EPS
from trimtab.rebased.kernels.polynomial import Polynomial

CHUNK = 64
"""Tokens whose weights among each other are formed."""
SPAN = 512
"""Tokens to a program: the shorter, the more programs, and the more traffic of states, 71 KB a head and span."""
TILE = 64
"""Columns of the values to a program."""
WIDEST = 16
"""Of queries and keys: beyond it the features of a chunk do not fit the registers."""
INTERPRETED = triton.knobs.runtime.interpret
"""Triton's interpreter takes bf16 for integers; there operands stay fp32."""
_F32 = torch.float32


def attention(
    q: Float[Tensor, "batch time heads d_k"],
    k: Float[Tensor, "batch time heads d_k"],
    v: Float[Tensor, "batch time heads d_v"],
    polynomial: Polynomial,
    scale: float,
    *,
    causal: bool = True,
    mask: Bool[Tensor, "batch time"] | None = None,
    state: Float[Tensor, "batch heads features d_v_and_1"] | None = None,
    eps: float = EPS,
) -> tuple[Float[Tensor, "batch time heads d_v"], Float[Tensor, "batch heads features d_v_and_1"]]:
    """As `naive.attention`; the state comes and goes in fp32. Raises InputError for d_k > 16 and for fp64."""
    if q.shape[-1] > WIDEST or v.dtype == torch.float64:
        raise InputError(f"The Triton kernel takes d_k <= {WIDEST} and at most fp32; `kernels.chunk` takes any.")
    return _Fused.apply(q, k, v, mask, state, _Job(polynomial, scale, causal, eps))


class _Job(NamedTuple):
    polynomial: Polynomial
    scale: float
    causal: bool
    eps: float

    def constants(self, q: Tensor, v: Tensor) -> dict[str, Any]:
        c0, c1, c2 = (self.polynomial.constant, self.polynomial.linear, self.polynomial.quadratic)
        tile = min(TILE, max(16, triton.next_power_of_2(v.shape[-1])))
        return {
            "C0": c0, "C1": c1 * self.scale, "C2": c2 * self.scale**2, "LOWER": self.polynomial.lower,
            "CHUNK": CHUNK, "SPAN": SPAN, "TILE": tile, "WIDTH": WIDEST,
            "HALF": v.dtype != _F32 and not INTERPRETED, "num_warps": 8,
        }  # fmt: skip


def _weights(job: _Job, like: Tensor) -> Tensor:
    """By which a row [1 + 16 + 256] of an unweighted state is multiplied where it is a feature of `expand`."""
    c0, c1, c2 = job.polynomial.constant, job.polynomial.linear * job.scale, job.polynomial.quadratic * job.scale**2
    square = torch.full((WIDEST, WIDEST), 2 * c2, device=like.device)
    square.fill_diagonal_(c2)
    return torch.cat([square.new_tensor([c0]), square.new_full((WIDEST,), c1), square.flatten()]).sqrt()


def _rows(job: _Job, d_k: int, device: torch.device) -> Tensor:
    """Which row of an unweighted state each feature of `expand` is."""
    a, b = torch.triu_indices(d_k, d_k, device=device)
    parts = [1 + WIDEST + a * WIDEST + b]
    if job.polynomial.linear:
        parts.insert(0, torch.arange(1, d_k + 1, device=device))
    if job.polynomial.constant:
        parts.insert(0, torch.zeros(1, dtype=torch.long, device=device))
    return torch.cat(parts)


def _packed(full: Tensor, job: _Job, d_k: int) -> Tensor:
    """[heads, 273, d_v + 1] as the others keep it: [heads, features, d_v + 1]."""
    rows = _rows(job, d_k, full.device)
    return full[:, rows] * _weights(job, full)[rows, None]


def _unpacked(state: Tensor, job: _Job, d_k: int) -> Tensor:
    """The other way round; rows below the diagonal equal those above."""
    rows = _rows(job, d_k, state.device)
    full = state.new_zeros(len(state), 1 + WIDEST + WIDEST**2, state.shape[2], dtype=_F32)
    full[:, rows] = state.to(_F32) / _weights(job, state)[rows, None]
    square = full[:, 1 + WIDEST :].unflatten(1, (WIDEST, WIDEST))
    square += _mirrored(square)
    return full


def _mirrored(square: Tensor) -> Tensor:
    """The strict upper triangle of the first two of three axes, mirrored."""
    upper = torch.ones(square.shape[1:3], device=square.device).triu(1)[None, :, :, None]
    return (square * upper).transpose(1, 2)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Tensor | None, job: _Job
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (_last_contiguous(x) for x in (q, k, v))
        seen = None if mask is None else mask[:, None, :].to(_F32).expand(-1, q.shape[2], -1).contiguous()
        first = None if state is None else _unpacked(state.flatten(0, 1), job, q.shape[3])
        states, last = _cumulated(_span_sums(k, v, seen, seen, job), first, job)
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        inverse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=_F32, device=q.device)
        flags = {"SEEN": seen is not None, "CAUSAL": job.causal}
        _launch(_outputs, job, q, v, (q, k, v, out), (states, _or(seen, q), inverse), **flags)
        ctx.save_for_backward(q, k, v, out, inverse, states, seen)
        ctx.job, ctx.stateful = job, state is not None
        return out, _packed(last, job, q.shape[3]).unflatten(0, (q.shape[0], q.shape[2]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, inverse, states, seen = ctx.saved_tensors
        job, d_k = ctx.job, q.shape[3]
        d_out = _last_contiguous(upstream[0])
        d_z = (-(d_out.float() * out.float()).sum(dim=-1).transpose(1, 2) * inverse).contiguous()
        after = _unpacked(upstream[1].flatten(0, 1), job, d_k)
        suffixes, first = _cumulated(_span_sums(q, d_out, inverse, d_z, job), after, job, backwards=True)
        tiles = triton.cdiv(v.shape[3], job.constants(q, v)["TILE"])
        d_q, d_k_parts = (torch.empty(tiles, *q.shape, dtype=_F32, device=q.device) for _ in range(2))
        d_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        strided, columns = (q, k, v, d_out), (_or(seen, q), inverse, d_z)
        flags = {"SEEN": seen is not None, "CAUSAL": job.causal}
        _launch(_query_gradients, job, q, v, strided, (*columns, states, d_q), **flags)
        _launch(_key_gradients, job, q, v, strided, (*columns, suffixes, d_k_parts, d_v), **flags)
        d_state = _packed(first, job, d_k).unflatten(0, (q.shape[0], q.shape[2])) if ctx.stateful else None
        return d_q.sum(0).to(q.dtype), d_k_parts.sum(0).to(k.dtype), d_v, None, d_state, None


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _or(seen: Tensor | None, like: Tensor) -> Tensor:
    """A pointer that is not read."""
    return like if seen is None else seen


def _span_sums(x: Tensor, u: Tensor, by: Tensor | None, last: Tensor | None, job: _Job) -> Tensor:
    """Sum over each span of the unweighted features of x times [by u, last]: [batch * heads, spans, 273, d_v + 1].
    `by` and `last` are columns; None: ones."""
    batch, time, heads, _ = x.shape
    spans = triton.cdiv(time, SPAN)
    sums = torch.empty(batch * heads, spans, 1 + WIDEST + WIDEST**2, u.shape[3] + 1, dtype=_F32, device=x.device)
    _launch(_sum_states, job, x, u, (x, u), (_or(by, x), _or(last, x), sums), SEEN=by is not None)
    return sums


def _cumulated(sums: Tensor, start: Tensor | None, job: _Job, backwards: bool = False) -> tuple[Tensor, Tensor]:
    """(state that each span begins with, state after all): sums over the spans before it, or, `backwards`, after it.
    Where attention is not causal every span has all of them."""
    if backwards:
        sums = sums.flip(1)
    total = sums.cumsum(dim=1)
    if start is not None:
        total += start[:, None]
    last = total[:, -1].clone()
    if not job.causal:
        return last[:, None].expand_as(total).contiguous(), last
    before = torch.empty_like(total)
    before[:, 1:] = total[:, :-1]
    before[:, 0] = 0 if start is None else start
    return before.flip(1) if backwards else before, last


def _launch(
    kernel: Any,
    job: _Job,
    q: Tensor,
    v: Tensor,
    strided: tuple[Tensor, ...],
    rest: tuple[Tensor, ...],
    **flags: bool,
) -> None:
    """Over spans, batch and heads, tiles of columns. `strided` are [batch, time, heads, width], read where they are."""
    batch, time, heads, d_k = q.shape
    constants = job.constants(q, v) | flags
    grid = (triton.cdiv(time, SPAN), batch * heads, triton.cdiv(v.shape[3], constants["TILE"]))
    strides = [stride for x in strided for stride in x.stride()[:3]]
    with torch.cuda.device_of(q):
        kernel[grid](*strided, *rest, *strides, job.eps, time, heads, d_k, v.shape[3], **constants)


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
def _sum_states(
    x, u, by, last, sums, xb, xt, xh, ub, ut, uh, eps, time, heads, d_k, d_v,
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
    q, k, v, out, states, seen, inverse, qb, qt, qh, kb, kt, kh, vb, vt, vh, ob, ot, oh, eps, time, heads, d_k, d_v,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, LOWER: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr,
    TILE: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, SEEN: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """out and 1 / (z + eps) of one span, whose state before it is states[row, span]."""
    span, row, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = row // heads, row % heads
    s0, s1, s2, z0, z1, z2 = _read_state(states, row * tl.num_programs(0) + span, tile, d_v, TILE, WIDTH)
    for chunk in range(0, SPAN, CHUNK):
        t = span * SPAN + chunk + tl.arange(0, CHUNK)
        Q = _rows_of(q, batch, head, t, time, qb, qt, qh, 0, d_k, WIDTH)
        square = _square(Q, CHUNK, WIDTH)
        total = C2 * _dot(square, s2, HALF)
        z = C2 * tl.sum(square * z2[None, :], 1)
        if LOWER:
            total += C1 * _dot(Q, s1, HALF) + C0 * s0[None, :]
            z += C1 * tl.sum(Q * z1[None, :], 1) + C0 * z0
        if CAUSAL:
            K = _rows_of(k, batch, head, t, time, kb, kt, kh, 0, d_k, WIDTH)
            U = _rows_of(v, batch, head, t, time, vb, vt, vh, tile * TILE, d_v, TILE)
            ones = (t < time).to(tl.float32)
            if SEEN:
                ones = _column_of(seen, row, t, time)
                U *= ones[:, None]
            p, _ = _weigh(_dot(Q, tl.trans(K), HALF), t, C0, C1, C2)
            total += _dot(p, U, HALF)
            z += tl.sum(p * ones[None, :], 1)
            s0, s1, s2, z0, z1, z2 = _add(s0, s1, s2, z0, z1, z2, K, U, ones, LOWER, CHUNK, WIDTH, HALF)
        over = 1 / (z + eps)
        columns = tile * TILE + tl.arange(0, TILE)
        inside = (t < time)[:, None] & (columns < d_v)[None, :]
        start = out + batch.to(tl.int64) * ob + head * oh
        tl.store(start + t.to(tl.int64)[:, None] * ot + columns[None, :], total * over[:, None], mask=inside)
        if tile == 0:
            tl.store(inverse + row.to(tl.int64) * time + t, over, mask=t < time)


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
    ones = (t < time).to(tl.float32)
    if SEEN:
        ones = _column_of(seen, row, t, time)
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
def _query_gradients(
    q, k, v, d_out, seen, inverse, d_z, states, d_q, qb, qt, qh, kb, kt, kh, vb, vt, vh, gb, gt, gh,
    eps, time, heads, d_k, d_v,
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
def _store_part(out, found, tile, batch, head, t, time, heads, d_k, WIDTH: tl.constexpr):
    """out[tile, batch, t, head], contiguous."""
    columns = tl.arange(0, WIDTH)
    batches = tl.num_programs(1) // heads
    rows = ((tile * batches + batch).to(tl.int64) * time + t) * heads + head
    inside = ((t >= 0) & (t < time))[:, None] & (columns < d_k)[None, :]
    tl.store(out + rows[:, None] * d_k + columns[None, :], found, mask=inside)


@triton.jit
@no_type_check
def _key_gradients(
    q, k, v, d_out, seen, inverse, d_z, states, d_k_parts, d_v_out, qb, qt, qh, kb, kt, kh, vb, vt, vh, gb, gt, gh,
    eps, time, heads, d_k, d_v,
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
