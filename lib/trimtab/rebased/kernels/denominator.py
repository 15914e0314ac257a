"""The sum of weights z_i = sum_j p(scale q_i.k_j) = phi(q_i).S_i, and what it may not fall below.

Where a query is nearly orthogonal to all keys, z is small against |phi(q)| |S|, and fp32 leaves it no digits and no
sign. So z alone is summed in fp64, one column of the d_v + 1, and is

    max(z_i, FLOOR (w.phi(q_i)) (w.S_i)) + eps,   w = 1 for the constant and for each x_a^2, else 0,

where w.phi(x) = sqrt(constant) + sqrt(quadratic) scale |x|^2 >= |phi(x)| is linear in phi, so that a state holds it.
FLOOR is half a unit in the last place of the numerator, which below the floor is rounding; there z has no gradient.

A state carries S in its last two columns: rounded to the state's precision, and what the rounding left.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.rebased.kernels import cpu
from trimtab.rebased.kernels.polynomial import Polynomial, bounding, expand

EPS = 1e-12
"""Added to the sum of weights; the paper's code has 1e-12, flash-linear-attention's layer 1e-5."""
BLOCK = 64
"""Tokens whose weights among each other are formed at once."""


def floor_share(dtype: torch.dtype) -> float:
    """FLOOR of a numerator in this precision."""
    return torch.finfo(dtype).eps / 2


def summed(state: Float[Tensor, "*batch features d_v_and_2"]) -> Float[Tensor, "*batch features"]:
    """S of a state, in fp64. A gradient in S goes to its rounded column alone."""
    return state[..., -2].double() + state[..., -1].detach().double()


def with_sum(
    values: Float[Tensor, "*batch features d_v"], total: Float[Tensor, "*batch features"]
) -> Float[Tensor, "*batch features d_v_and_2"]:
    """The state of sum_j phi(k_j) v_j and S = sum_j phi(k_j). A gradient in S comes from its rounded column alone."""
    rounded = total.to(values.dtype)
    rest = (total - rounded.to(total.dtype)).to(values.dtype).detach()
    return torch.cat([values, rounded[..., None], rest[..., None]], dim=-1)


def floored(
    z: Float[Tensor, "*batch"], bound: Float[Tensor, "*batch"], eps: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "*batch"], Bool[Tensor, "*batch"]]:
    """(max(z, FLOOR bound) + eps, whether z stands)."""
    least = floor_share(dtype) * bound.detach()
    free = z > least
    return torch.where(free, z, least) + eps, free


def inverted(
    z: Float[Tensor, "*batch"], bound: Float[Tensor, "*batch"], eps: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """`inverse` and `slope` of `Denominators`, for a numerator in `dtype`."""
    total, free = floored(z, bound, eps, dtype)
    inverse = (1 / total).to(dtype)
    return inverse, inverse * free


class Denominators(NamedTuple):
    """Of every token of every row, rows being batch and heads."""

    inverse: Float[Tensor, "rows time 1"]
    """1 / (floored z + eps)."""
    slope: Float[Tensor, "rows time 1"]
    """The same where z stands, 0 where the floor does: a gradient in z is - do.o times it."""
    total: Float[Tensor, "rows features"]
    """S over all tokens, in fp64."""


@torch.no_grad()
def denominators(
    q: Float[Tensor, "batch time heads d_k"],
    k: Float[Tensor, "batch time heads d_k"],
    mask: Bool[Tensor, "batch time"] | None,
    before: Float[Tensor, "rows features"] | None,
    polynomial: Polynomial,
    scale: float,
    causal: bool,
    eps: float,
    dtype: torch.dtype,
) -> Denominators:
    """Without gradients, given S of earlier tokens; `dtype`: of the numerator."""
    batch, _, heads, width = q.shape
    shape = (batch * heads, polynomial.features(width))
    total = torch.zeros(shape, dtype=torch.float64, device=q.device) if before is None else before.clone()
    if q.device.type == "cpu":
        z, bound = cpu.denominators(q, k, mask, total, polynomial, scale, causal)
    else:
        z, bound = _blockwise(q, k, mask, total, polynomial, scale, causal)
    inverse, slope = inverted(z, bound, eps, dtype)
    return Denominators(inverse[..., None], slope[..., None], total)


def _blockwise(
    q: Tensor, k: Tensor, mask: Tensor | None, total: Tensor, polynomial: Polynomial, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """z and its bound [rows, time]; `total` takes in the keys, in place."""
    time, width = q.shape[1], q.shape[3]
    q, k = (x.transpose(1, 2).flatten(0, 1).double() for x in (q, k))
    seen = k.new_ones(len(k), time) if mask is None else mask.double().repeat_interleave(len(k) // len(mask), dim=0)
    w = bounding(polynomial, width, q.device)
    pieces = [slice(start, start + BLOCK) for start in range(0, time, BLOCK)]
    z, bound = torch.empty_like(seen), torch.empty_like(seen)

    def take_in(piece: slice) -> None:
        total.add_(torch.einsum("rtf,rt->rf", expand(k[:, piece], polynomial, scale), seen[:, piece]))

    if not causal:
        for piece in pieces:
            take_in(piece)
    for piece in pieces:
        phi = expand(q[:, piece], polynomial, scale)
        z[:, piece] = torch.einsum("rtf,rf->rt", phi, total)
        sizes = (total @ w)[:, None]
        if causal:
            weights = polynomial(scale * q[:, piece] @ k[:, piece].transpose(1, 2)).tril()
            z[:, piece] += torch.einsum("rij,rj->ri", weights, seen[:, piece])
            sizes = sizes + ((expand(k[:, piece], polynomial, scale) @ w) * seen[:, piece]).cumsum(dim=1)
            take_in(piece)
        bound[:, piece] = (phi @ w) * sizes
    return z, bound
