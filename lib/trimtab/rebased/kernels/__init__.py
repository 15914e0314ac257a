"""Attention whose weights are a polynomial of the product of query and key, four ways.

`naive` is the definition, quadratic in time; `chunk` the same in linear time on any device; `triton` fused, on a GPU;
`recurrent` one token at a time with a carried state. `attention` takes Triton on a GPU, for d_k up to 16, and else
`chunk`.
"""

import importlib

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.rebased.kernels import chunk
from trimtab.rebased.kernels.naive import EPS
from trimtab.rebased.kernels.polynomial import BASED, REBASED, Polynomial, expand
from trimtab.rebased.kernels.recurrent import empty_state, step

__all__ = ["BASED", "EPS", "REBASED", "Polynomial", "attention", "empty_state", "expand", "step"]


def attention(
    q: Float[Tensor, "batch time heads d_k"],
    k: Float[Tensor, "batch time heads d_k"],
    v: Float[Tensor, "batch time heads d_v"],
    polynomial: Polynomial = REBASED,
    *,
    scale: float | None = None,
    causal: bool = True,
    mask: Bool[Tensor, "batch time"] | None = None,
    state: Float[Tensor, "batch heads features d_v_and_1"] | None = None,
    eps: float = EPS,
) -> tuple[Float[Tensor, "batch time heads d_v"], Float[Tensor, "batch heads features d_v_and_1"]]:
    """sum_j p(scale q_i.k_j) v_j / (sum_j p(scale q_i.k_j) + eps), and the state after the last token; see
    `naive.attention`. `scale`: d_k^-1/2 unless given. Differentiable in q, k, v and the state."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    fused = q.is_cuda and q.shape[-1] <= 16 and v.dtype != torch.float64
    module = importlib.import_module(f"{__name__}.triton") if fused else chunk
    return module.attention(q, k, v, polynomial, scale, causal=causal, mask=mask, state=state, eps=eps)
