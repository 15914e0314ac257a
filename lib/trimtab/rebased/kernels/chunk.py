"""Polynomial attention in time linear in the sequence, on any device: chunks, and states between them.

Tokens of one chunk see each other through the matrix of weights, and all that came before through one state, the sum of
phi(k_j) [v_j, 1]. The backward pass runs the other way with the sum of phi(q_i) g_i over all that come after, where

    g_i = [dnum_i, dz_i],  dnum_i = do_i / (z_i + eps),  dz_i = - do_i . o_i / (z_i + eps) where z_i is not floored,

and makes the features again: kept are q, k, v, the output, 1 / (z + eps) and one state a chunk. Arithmetic and states
are in fp32 (fp64 for fp64) but for z, see `denominator`; the division comes before rounding to v's precision.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.rebased.kernels import cpu
from trimtab.rebased.kernels.denominator import EPS, denominators, summed, with_sum
from trimtab.rebased.kernels.polynomial import Polynomial, expand, fold

CHUNK = 64
"""Tokens to a chunk: a longer one has more weights to form, a shorter one more states to write."""


@torch.compiler.disable  # numba and memory written in place: one clean break in a compiled model's graph
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
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "batch time heads d_v"], Float[Tensor, "batch heads features d_v_and_2"]]:
    """As `naive.attention`, in time and memory O(time)."""
    with torch.autocast(q.device.type, enabled=False):  # which would have states in 16 bits
        return _Chunked.apply(q, k, v, mask, state, _Job(polynomial, scale, causal, eps, chunk))


class _Job(NamedTuple):
    polynomial: Polynomial
    scale: float
    causal: bool
    eps: float
    chunk: int

    def expand(self, x: Tensor) -> Tensor:
        """Features [rows, features, chunk] of queries or keys [rows, d_k, chunk]."""
        if x.device.type == "cpu":
            return cpu.expand(x, self.polynomial, self.scale)
        return expand(x.transpose(1, 2), self.polynomial, self.scale).transpose(1, 2)

    def fold_into(self, gradient: Tensor, x: Tensor, out: Tensor) -> None:
        """Add to `out` the gradient in x, given that in its features."""
        if x.device.type == "cpu":
            cpu.fold_into(gradient, x, out, self.polynomial, self.scale)
        else:
            out += fold(gradient.transpose(1, 2), x.transpose(1, 2), self.polynomial, self.scale).transpose(1, 2)

    def scores(self, Q: Tensor, K: Tensor) -> Tensor:
        """scale q_i.k_j [rows, chunk, chunk]."""
        return torch.bmm(Q.transpose(1, 2), K).mul_(self.scale)

    def weights(self, scores: Tensor) -> Tensor:
        """p of the scores for j <= i, else 0."""
        return self.polynomial(scores).tril_()


class _Rows(NamedTuple):
    """Tensors [batch, time, heads, width], read a chunk at a time with batch and heads as rows, in one precision.

    Queries, keys and their features have tokens last, values and gradients of outputs first.
    """

    dtype: torch.dtype
    mask: Tensor | None

    def tokens_last(self, x: Tensor, piece: slice) -> Tensor:
        return self._contiguous(x[:, piece].permute(0, 2, 3, 1))

    def tokens_first(self, x: Tensor, piece: slice) -> Tensor:
        return self._contiguous(x[:, piece].transpose(1, 2))

    def _contiguous(self, x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=self.dtype, device=x.device).copy_(x).flatten(0, 1)

    def with_ones(self, v: Tensor, piece: slice) -> Tensor:
        """[v, 1]; zeros where the mask is False."""
        part = v[:, piece].transpose(1, 2)
        u = torch.empty(*part.shape[:3], part.shape[3] + 1, dtype=self.dtype, device=v.device)
        u[..., :-1] = part
        u[..., -1] = 1
        if self.mask is not None:
            u *= self.mask[:, None, piece, None]
        return u.flatten(0, 1)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Tensor | None, job: _Job
    ) -> tuple[Tensor, Tensor]:
        (batch, time, heads, d_k), d_v = q.shape, v.shape[3]
        rows = _Rows(torch.float64 if v.dtype == torch.float64 else torch.float32, mask)
        pieces = [slice(start, min(start + job.chunk, time)) for start in range(0, time, job.chunk)]
        shape = (len(pieces) + 1, batch * heads, job.polynomial.features(d_k), d_v + 1)
        # states[i]: over all tokens before chunk i; the last: over all. Their last column is read backwards alone.
        states = torch.empty(shape, dtype=rows.dtype, device=v.device)
        states[0] = 0 if state is None else state[..., :-1].flatten(0, 1)
        before = None if state is None else summed(state.flatten(0, 1))
        below = denominators(q, k, mask, before, job.polynomial, job.scale, job.causal, job.eps, rows.dtype)
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        # Not rounded: the backward pass multiplies it by the gradient and takes the difference of much alike.
        exact = out if v.dtype == rows.dtype else torch.empty(v.shape, dtype=rows.dtype, device=v.device)

        def finish(sums: Tensor, piece: slice) -> None:
            exact[:, piece] = sums.mul_(below.inverse[:, piece]).unflatten(0, (batch, heads)).transpose(1, 2)

        for i, piece in enumerate(pieces):
            K, U = rows.tokens_last(k, piece), rows.with_ones(v, piece)
            torch.baddbmm(states[i], job.expand(K), U, out=states[i + 1])
            if job.causal:
                Q = rows.tokens_last(q, piece)
                sums = torch.bmm(job.weights(job.scores(Q, K)), U[..., :-1])
                finish(sums.baddbmm_(job.expand(Q).transpose(1, 2), states[i, ..., :-1]), piece)
        if not job.causal:
            for piece in pieces:
                finish(torch.bmm(job.expand(rows.tokens_last(q, piece)).transpose(1, 2), states[-1, ..., :-1]), piece)
        if exact is not out:
            out.copy_(exact)
        kept = states if job.causal else states[-1:].clone()
        ctx.save_for_backward(q, k, v, exact, below.inverse, below.slope, kept, mask)
        ctx.job, ctx.pieces, ctx.stateful = job, pieces, state is not None
        return out, with_sum(states[-1, ..., :-1], below.total).unflatten(0, (batch, heads))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(upstream[0].device.type, enabled=False):
            return _backward(ctx, *upstream)


def _backward(ctx: Any, d_out: Tensor, d_after: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, inverse, slope, states, mask = ctx.saved_tensors
    job, rows, heads = ctx.job, _Rows(inverse.dtype, mask), q.shape[2]
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    # Sum of phi(q_i) g_i over all that come after; what rounding left, a state's last column, has no gradient.
    after = d_after[..., :-1].flatten(0, 1).to(inverse.dtype, copy=True)

    def divided(piece: slice) -> Tensor:
        """g: [dnum, dz]."""
        do, o = rows.tokens_first(d_out, piece), rows.tokens_first(out, piece)
        dz = torch.linalg.vecdot(do, o)[..., None].mul_(slope[:, piece]).neg_()
        return torch.cat([do.mul_(inverse[:, piece]), dz], dim=-1)

    if not job.causal:
        for piece in ctx.pieces:
            after.baddbmm_(job.expand(rows.tokens_last(q, piece)), divided(piece))
    for i, piece in reversed(list(enumerate(ctx.pieces))):
        Q, K, U = rows.tokens_last(q, piece), rows.tokens_last(k, piece), rows.with_ones(v, piece)
        G = divided(piece)
        if job.causal:
            scores = job.scores(Q, K)
            d_scores = torch.bmm(G, U.transpose(1, 2)).mul_(job.polynomial.slope(scores)).mul_(job.scale).tril_()
            dQ, dK = torch.bmm(K, d_scores.transpose(1, 2)), torch.bmm(Q, d_scores)
            dU = torch.bmm(job.weights(scores).transpose(1, 2), G)
        else:
            dQ, dK, dU = torch.zeros_like(Q), torch.zeros_like(K), torch.zeros_like(U)
        job.fold_into(torch.bmm(states[i if job.causal else 0], G.transpose(1, 2)), Q, dQ)
        job.fold_into(torch.bmm(after, U.transpose(1, 2)), K, dK)
        dU.baddbmm_(job.expand(K).transpose(1, 2), after)
        if job.causal:
            after.baddbmm_(job.expand(Q), G)
        dV = dU[..., :-1].unflatten(0, (-1, heads)).transpose(1, 2)
        d_v[:, piece] = dV if mask is None else dV * mask[:, piece, None, None]
        for out_of, made in ((d_q, dQ), (d_k, dK)):
            out_of[:, piece] = made.unflatten(0, (-1, heads)).permute(0, 3, 1, 2)
    d_state = F.pad(after, (0, 1)).unflatten(0, (-1, heads)) if ctx.stateful else None
    return d_q, d_k, d_v, None, d_state, None
