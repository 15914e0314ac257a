"""What an SAE computes, sparsely and differentiably: select the k largest latents, and the loss over their prefixes.

`naive` is the definition; `cpu` (numba) and `triton` are the same, fast. The tensors' device chooses: CPU tensors go
to `cpu`, CUDA tensors to `triton`, those of any other device to `naive`.
"""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.sae.kernels import naive

__all__ = ["encode", "prefix_loss"]


def encode(
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "latents d_model"],
    b_enc: Float[Tensor, " latents"],
    k: int,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """(values, indices) of the k largest of ReLU(W_enc x + b_enc) in each row, in descending order.

    The product is computed in `dtype` (default: that of the weights), the values come in x's own. Backward touches the
    active latents only: dL/dW_enc[i] += dv x and dL/db_enc[i] += dv, where v > 0.
    """
    return _Encode.apply(x, W_enc, b_enc, k, dtype)


def prefix_loss(
    x: Float[Tensor, "batch d_model"],
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "latents d_model"],
    b_dec: Float[Tensor, " d_model"],
    weights: Float[Tensor, "rows prefixes"],
) -> Float[Tensor, ""]:
    """sum over rows and prefixes j = 0..k of weights[., j] ||x - x_hat_j||^2, see `naive.prefix_loss`.

    Differentiable in values, W_dec and b_dec. Prefixes are of the latents in the order given.
    """
    return _PrefixLoss.apply(x, values, indices, W_dec, b_dec, weights)


def _backend(tensor: Tensor) -> Any:
    name = {"cpu": "cpu", "cuda": "triton"}.get(tensor.device.type, "naive")
    return importlib.import_module(f"{__name__}.{name}")


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype | None) -> Any:
        dtype = dtype or W_enc.dtype
        pre = F.linear(x.to(dtype), W_enc.to(dtype), b_enc.to(dtype))
        values, indices = _backend(x).select(pre, k)
        ctx.save_for_backward(x, W_enc, values, indices)
        ctx.mark_non_differentiable(indices)
        return values.to(x.dtype), indices

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, values, indices = ctx.saved_tensors
        d_values = torch.where(values > 0, upstream[0], 0)
        scatter_rows = _backend(x).scatter_rows
        d_W = scatter_rows(d_values, indices, x, len(W_enc)).to(W_enc.dtype)
        # Not index_add_, which adds atomically on a GPU.
        d_b = scatter_rows(d_values, indices, torch.ones_like(x[:, :1]), len(W_enc))[:, 0].to(W_enc.dtype)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = F.embedding_bag(indices, W_enc, per_sample_weights=d_values.to(W_enc.dtype), mode="sum").to(x.dtype)
        return d_x, d_W, d_b, None, None


class _PrefixLoss(torch.autograd.Function):
    """Computes the loss and its gradients in one go, since both walk the same prefixes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor, weights: Tensor
    ) -> Tensor:
        backend = _backend(x)
        if backend is naive:
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in (values, W_dec, b_dec)]
                loss = naive.prefix_loss(x, leaves[0], indices, leaves[1], leaves[2], weights)
                gradients = torch.autograd.grad(loss, leaves)
        else:
            loss, *gradients = backend.prefix_gradients(x, values, indices, W_dec, b_dec, weights)
        ctx.save_for_backward(*(g.to(t.dtype) for g, t in zip(gradients, (values, W_dec, b_dec), strict=True)))
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_values, d_W, d_b = (upstream[0] * gradient for gradient in ctx.saved_tensors)
        return None, d_values, None, d_W, d_b, None
