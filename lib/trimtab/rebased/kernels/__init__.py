"""Attention whose weights are a polynomial of the product of query and key, four ways.

`naive` is the definition, quadratic in time; `chunk` the same in linear time on any device; `triton` fused, on a GPU;
`recurrent` one token at a time with a carried state. `attention` takes Triton on a GPU, for d_k up to 16, and else
`chunk`.
"""

import importlib

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.errors import InputError
from trimtab.rebased.kernels import chunk
from trimtab.rebased.kernels.denominator import EPS
from trimtab.rebased.kernels.polynomial import BASED, REBASED, Polynomial, expand
from trimtab.rebased.kernels.recurrent import empty_state, step

__all__ = ["BASED", "EPS", "REBASED", "Polynomial", "attention", "empty_state", "expand", "step"]


def attention(
    q: Float[Tensor, "batch queries heads d_k"],
    k: Float[Tensor, "batch time heads d_k"],
    v: Float[Tensor, "batch time heads d_v"],
    polynomial: Polynomial = REBASED,
    *,
    scale: float | None = None,
    causal: bool = True,
    mask: Bool[Tensor, "batch time"] | None = None,
    state: Float[Tensor, "batch heads features d_v_and_2"] | None = None,
    eps: float = EPS,
) -> tuple[Float[Tensor, "batch queries heads d_v"], Float[Tensor, "batch heads features d_v_and_2"]]:
    """sum_j p(scale q_i.k_j) v_j / (sum_j p(scale q_i.k_j) + eps), and the state after the last token; see
    `naive.attention` and, for what the denominator does not fall below, `denominator`. `scale`: d_k^-1/2 unless given.
    Differentiable in q, k, v and the state.

    Where attention is not causal, there may be more or fewer queries than keys. Raises InputError for shapes that do
    not fit and for an eps that is not positive.
    """
    if not eps > 0:
        raise InputError(f"`eps` is {eps}, where the denominator takes a number above 0.")
    queries, keys = q.shape[1], k.shape[1]
    if k.shape[:3] != v.shape[:3] or k.shape[::2] + k.shape[3:] != q.shape[::2] + q.shape[3:]:
        shapes = f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)}"
        raise InputError(f"{shapes} do not fit: they are [batch, time, heads, width], alike but for the width of v.")
    if mask is not None and tuple(mask.shape) != (len(k), keys):
        raise InputError(f"`mask` has shape {list(mask.shape)}, where keys have {[len(k), keys]}.")
    if queries != keys:
        if causal:
            raise InputError(f"{queries} queries cannot attend causally to {keys} keys: give as many of each.")
        longest = max(queries, keys)
        mask = torch.ones(len(k), keys, dtype=torch.bool, device=k.device) if mask is None else mask
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, longest - x.shape[1])) for x in (q, k, v))
        mask = F.pad(mask, (0, longest - keys))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    fused = q.is_cuda and q.shape[-1] <= 16 and v.dtype != torch.float64
    module = importlib.import_module(f"{__name__}.triton") if fused else chunk
    out, after = module.attention(q, k, v, polynomial, scale, causal=causal, mask=mask, state=state, eps=eps)
    return out[:, :queries], after
