"""Polynomial attention as it is defined: the whole matrix of weights, in O(time^2)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.rebased.kernels.polynomial import Polynomial, expand

EPS = 1e-6
"""Added to the sum of weights, which is 0 only where no product of query and key differs from 0."""


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
    """o_i = sum_j p(scale q_i.k_j) v_j / (sum_j p(scale q_i.k_j) + eps), over j <= i where causal.

    `mask` is False for tokens that nobody sees. `state` sums phi(k_j) [v_j, 1] over tokens that came before; the second
    value does so over these as well. Computed in fp32 (fp64 for fp64), returned in v's precision.
    """
    with torch.autocast(q.device.type, enabled=False):  # fp32 means fp32
        dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
        q, k = q.to(dtype), k.to(dtype)
        u = torch.cat([v.to(dtype), torch.ones_like(v[..., :1], dtype=dtype)], dim=-1)
        if mask is not None:
            u = u * mask[:, :, None, None]
        weights = polynomial(scale * torch.einsum("bihd,bjhd->bhij", q, k))
        if causal:
            weights = weights.tril()
        sums = torch.einsum("bhij,bjhv->bihv", weights, u)
        after = torch.einsum("bjhf,bjhv->bhfv", expand(k, polynomial, scale), u)
        if state is not None:
            sums = sums + torch.einsum("bihf,bhfv->bihv", expand(q, polynomial, scale), state.to(dtype))
            after = after + state.to(dtype)
        return (sums[..., :-1] / (sums[..., -1:] + eps)).to(v.dtype), after
