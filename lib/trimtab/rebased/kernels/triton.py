"""Polynomial attention on a GPU: linear in time, features made in registers, division inside, nothing added atomically.

The sequence is cut into spans, spans into chunks. One program per span sums its tokens' state (`_sum_states`); a
cumulative sum over spans gives the state before each; then one program per span walks its chunks with that state in
registers (`_outputs`). The sums of weights come first and the same way, in fp64 and from moments of the keys instead of
states (`_sum_moments`, `_denominators`). Backwards `_sum_states` sums phi(q_i) [dnum_i, dz_i], see `chunk`, the
cumulative sum runs the other way, `_query_gradients` walks up and `_key_gradients` down. Tensors are read where they
are, [batch, time, heads, width] with any strides but the last.

In memory a state has a row for the constant, d_k for the linear and d_k^2 for the square's features, unweighted: whole
squares suit the tensor cores better than the triangle. Its last column belongs to z, backwards. Operands of products
are bf16 for 16-bit inputs, sums and states fp32.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.errors import InputError
from trimtab.rebased.kernels.denominator import EPS, inverted, summed, with_sum
from trimtab.rebased.kernels.polynomial import Polynomial
from trimtab.rebased.kernels.triton_programs import (
    _denominators,
    _key_gradients,
    _outputs,
    _query_gradients,
    _sum_moments,
    _sum_states,
)

CHUNK = 64
"""Tokens whose weights among each other are formed."""
SPAN = 512
"""Tokens to a program: the shorter, the more programs, and the more traffic of states, 71 KB a head and span."""
TILE = 64
"""Columns of the values to a program."""
BLOCK = 16
"""Tokens whose weights among each other are formed in fp64."""
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
    state: Float[Tensor, "batch heads features d_v_and_2"] | None = None,
    eps: float = EPS,
) -> tuple[Float[Tensor, "batch time heads d_v"], Float[Tensor, "batch heads features d_v_and_2"]]:
    """As `naive.attention`; the state comes and goes in fp32. Raises InputError for d_k > 16 and for fp64."""
    if q.shape[-1] > WIDEST or v.dtype == torch.float64:
        raise InputError(f"The Triton kernel takes d_k <= {WIDEST} and at most fp32; `kernels.chunk` takes any.")
    return _Fused.apply(q, k, v, mask, state, _Job(polynomial, scale, causal, eps))


class _Job(NamedTuple):
    polynomial: Polynomial
    scale: float
    causal: bool
    eps: float

    def coefficients(self) -> dict[str, float]:
        """Of the polynomial in q.k itself."""
        c0, c1, c2 = self.polynomial.constant, self.polynomial.linear, self.polynomial.quadratic
        return {"C0": c0, "C1": c1 * self.scale, "C2": c2 * self.scale**2}

    def constants(self, q: Tensor, v: Tensor) -> dict[str, Any]:
        tile = min(TILE, max(16, triton.next_power_of_2(v.shape[-1])))
        return {
            **self.coefficients(), "LOWER": self.polynomial.lower,
            "CHUNK": CHUNK, "SPAN": SPAN, "TILE": tile, "WIDTH": WIDEST,
            "HALF": v.dtype != _F32 and not INTERPRETED, "num_warps": 8,
        }  # fmt: skip


def _weights(job: _Job, like: Tensor) -> Tensor:
    """By which a row [1 + 16 + 256] of an unweighted state is multiplied where it is a feature of `expand`."""
    c0, c1, c2 = job.coefficients().values()
    square = torch.full((WIDEST, WIDEST), 2 * c2, device=like.device, dtype=like.dtype)
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
    full = state.new_zeros(len(state), 1 + WIDEST + WIDEST**2, state.shape[2])
    full[:, rows] = state / _weights(job, state)[rows, None]
    square = full[:, 1 + WIDEST :].unflatten(1, (WIDEST, WIDEST))
    square += _mirrored(square)
    return full


def _mirrored(square: Tensor) -> Tensor:
    """The strict upper triangle of the first two of three axes, mirrored."""
    upper = torch.ones(square.shape[1:3], device=square.device, dtype=square.dtype).triu(1)[None, :, :, None]
    return (square * upper).transpose(1, 2)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Tensor | None, job: _Job
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (_last_contiguous(x) for x in (q, k, v))
        seen = None if mask is None else mask[:, None, :].to(_F32).expand(-1, q.shape[2], -1).contiguous()
        first = None if state is None else _unpacked(state[..., :-1].flatten(0, 1).float(), job, q.shape[3])
        inverse, slope, total = _below(q, k, seen, None if state is None else summed(state.flatten(0, 1)), job)
        states, last = _cumulated(_span_sums(k, v, seen, seen, job), first, job)
        # In fp32: the backward pass multiplies it by the gradient and takes the difference of much alike.
        out = torch.empty(v.shape, dtype=_F32, device=v.device)
        flags = {"SEEN": seen is not None, "CAUSAL": job.causal}
        _launch(_outputs, job, q, v, (q, k, v, out), (states, inverse, _or(seen, q)), **flags)
        ctx.save_for_backward(q, k, v, out, inverse, slope, states, seen)
        ctx.job, ctx.stateful = job, state is not None
        after = with_sum(_packed(last, job, q.shape[3])[..., :-1], total)
        return out.to(v.dtype), after.unflatten(0, (q.shape[0], q.shape[2]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, inverse, slope, states, seen = ctx.saved_tensors
        job, d_k = ctx.job, q.shape[3]
        d_out = _last_contiguous(upstream[0])
        d_z = (-(d_out.float() * out).sum(dim=-1).transpose(1, 2) * slope).contiguous()
        after = _unpacked(upstream[1][..., :-1].flatten(0, 1).float(), job, d_k)
        suffixes, first = _cumulated(_span_sums(q, d_out, inverse, d_z, job), after, job, backwards=True)
        tiles = triton.cdiv(v.shape[3], job.constants(q, v)["TILE"])
        d_q, d_k_parts = (torch.empty(tiles, *q.shape, dtype=_F32, device=q.device) for _ in range(2))
        d_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        strided, columns = (q, k, v, d_out), (_or(seen, q), inverse, d_z)
        flags = {"SEEN": seen is not None, "CAUSAL": job.causal}
        _launch(_query_gradients, job, q, v, strided, (*columns, states, d_q), **flags)
        _launch(_key_gradients, job, q, v, strided, (*columns, suffixes, d_k_parts, d_v), **flags)
        d_first = F.pad(_packed(first, job, d_k), (0, 1)).unflatten(0, (q.shape[0], q.shape[2]))
        d_state = d_first if ctx.stateful else None
        return d_q.sum(0).to(q.dtype), d_k_parts.sum(0).to(k.dtype), d_v, None, d_state, None


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _or(seen: Tensor | None, like: Tensor) -> Tensor:
    """A pointer that is not read."""
    return like if seen is None else seen


def _below(
    q: Tensor, k: Tensor, seen: Tensor | None, before: Tensor | None, job: _Job
) -> tuple[Tensor, Tensor, Tensor]:
    """1 / (z + eps) [batch, heads, time], the same or 0 where z is floored, and the sum of phi(k_j); `denominator`."""
    (batch, time, heads, d_k), spans = q.shape, triton.cdiv(q.shape[1], SPAN)
    shared = {"SPAN": SPAN, "BLOCK": BLOCK, "WIDTH": WIDEST, "SEEN": seen is not None}
    sizes, grid = (time, heads, d_k), (spans, batch * heads)
    moments = torch.empty(batch * heads, spans, 1 + WIDEST + WIDEST**2, 1, dtype=torch.float64, device=q.device)
    z, bound = (torch.empty(batch, heads, time, dtype=torch.float64, device=q.device) for _ in range(2))
    first = None if before is None else _unpacked(before[..., None], job, d_k)
    with torch.cuda.device_of(q):
        _sum_moments[grid](k, moments, _or(seen, q), *k.stride()[:3], *sizes, **shared)
        starts, last = _cumulated(moments, first, job)
        arrays, strides = (q, k, starts, _or(seen, q), z, bound), (*q.stride()[:3], *k.stride()[:3])
        _denominators[grid](*arrays, *strides, *sizes, **job.coefficients(), CAUSAL=job.causal, **shared)
    return *inverted(z, bound, job.eps, _F32), _packed(last, job, d_k)[..., 0]


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
        kernel[grid](*strided, *rest, *strides, time, heads, d_k, v.shape[3], **constants)
