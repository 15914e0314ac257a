"""Polynomial attention as it is defined: the whole matrix of weights, in O(time^2)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.rebased.kernels.denominator import EPS, floored, summed, with_sum
from trimtab.rebased.kernels.polynomial import Polynomial, bounding, expand


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
    """o_i = sum_j p(scale q_i.k_j) v_j / (z_i + eps), z_i = sum_j p(scale q_i.k_j), over j <= i where causal.

    `mask` is False for tokens that nobody sees. `state` sums phi(k_j) [v_j, 1] over tokens that came before; the second
    value does so over these as well. Sums of values are computed in fp32 (fp64 for fp64), z in fp64 and floored as
    `denominator` says; returned in v's precision.
    """
    with torch.autocast(q.device.type, enabled=False):  # fp32 means fp32
        dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
        seen = torch.ones_like(k[..., 0, 0], dtype=torch.float64) if mask is None else mask.double()
        u = v.to(dtype) * seen.to(dtype)[:, :, None, None]
        rough = q.to(dtype), k.to(dtype)  # one gradient for both uses, so that 16 bits round it once
        precise = rough[0].double(), rough[1].double()
        sums = torch.einsum("bhij,bjhv->bihv", _weights(*rough, polynomial, scale, causal), u)
        z = torch.einsum("bhij,bj->bih", _weights(*precise, polynomial, scale, causal), seen)
        phi_q, phi_k = (expand(x, polynomial, scale) for x in precise)
        phi_k = phi_k * seen[:, :, None, None]
        total, w = phi_k.sum(dim=1), bounding(polynomial, q.shape[3], q.device)
        sizes = (phi_k @ w).cumsum(dim=1) if causal else (total @ w)[:, None]
        after = torch.einsum("bjhf,bjhv->bhfv", expand(rough[1], polynomial, scale), u)
        if state is not None:
            before, state = summed(state), state[..., :-2].to(dtype)
            sums = sums + torch.einsum("bihf,bhfv->bihv", expand(rough[0], polynomial, scale), state)
            z = z + torch.einsum("bihf,bhf->bih", phi_q, before)
            sizes = sizes + (before @ w)[:, None]
            after, total = after + state, total + before
        z, _ = floored(z, (phi_q @ w) * sizes, eps, dtype)
        return (sums / z[..., None].to(dtype)).to(v.dtype), with_sum(after, total)


def _weights(q: Tensor, k: Tensor, polynomial: Polynomial, scale: float, causal: bool) -> Tensor:
    weights = polynomial(scale * torch.einsum("bihd,bjhd->bhij", q, k))
    return weights.tril() if causal else weights
