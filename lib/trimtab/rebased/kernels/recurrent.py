"""One token at a time with a carried state: what a token costs does not depend on how many came before."""

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.rebased.kernels import cpu
from trimtab.rebased.kernels.denominator import EPS, floor_share, floored, summed, with_sum
from trimtab.rebased.kernels.polynomial import Polynomial, bounding, expand


def empty_state(
    batch: int, heads: int, d_k: int, d_v: int, polynomial: Polynomial, like: Tensor
) -> Float[Tensor, "batch heads features d_v_and_2"]:
    """The state before any token: zeros, in fp32 (fp64 where `like` is)."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.zeros(batch, heads, polynomial.features(d_k), d_v + 2, dtype=dtype, device=like.device)


def step(
    q: Float[Tensor, "batch heads d_k"],
    k: Float[Tensor, "batch heads d_k"],
    v: Float[Tensor, "batch heads d_v"],
    polynomial: Polynomial,
    scale: float,
    state: Float[Tensor, "batch heads features d_v_and_2"],
    *,
    eps: float = EPS,
) -> Float[Tensor, "batch heads d_v"]:
    """The output for the next token; `state` is changed in place. Without gradients."""
    batch, heads, _ = q.shape
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        flat = state.view(batch * heads, *state.shape[2:])
        q, k, u = (x.detach().to(state.dtype).reshape(batch * heads, -1).contiguous() for x in (q, k, v))
        if state.device.type == "cpu":
            out = cpu.step(q, k, u, flat, polynomial, scale, eps, floor_share(state.dtype))
        else:
            phi_q, phi_k = expand(torch.stack([q, k]).double(), polynomial, scale)
            values, total = flat[..., :-2], summed(flat) + phi_k
            values += phi_k[:, :, None].to(u.dtype) * u[:, None, :]
            flat.copy_(with_sum(values, total))
            w = bounding(polynomial, q.shape[1], q.device)
            z, _ = floored((phi_q * total).sum(dim=1), (phi_q @ w) * (total @ w), eps, state.dtype)
            out = torch.bmm(phi_q[:, None, :].to(u.dtype), values)[:, 0] / z[:, None].to(u.dtype)
    return out.view(batch, heads, -1).to(v.dtype)
