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

from trimtab.errors import InputError
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
    active latents only: dL/dW_enc[i] += dv x and dL/db_enc[i] += dv, where v > 0. Raises InputError for shapes that do
    not fit, for a k that the dictionary does not have, and where x is not of a floating dtype.
    """
    _fits(x, W_enc)
    if list(b_enc.shape) != [len(W_enc)]:
        raise InputError(f"`b_enc` has shape {list(b_enc.shape)}, which does not fit {len(W_enc)} latents.")
    if not 1 <= k <= len(W_enc):
        raise InputError(f"k must lie between 1 and the dictionary's {len(W_enc)} latents, not {k}.")
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

    Differentiable in x, values, W_dec and b_dec. Prefixes are of the latents in the order given. Raises InputError for
    shapes that do not fit and for an index that is no latent's (IndexError on a GPU, where nobody waits for the check).
    """
    _fits(x, W_dec)
    rows, k = (len(x), values.shape[1]) if values.dim() == 2 else (-1, -1)
    alike = 1 if weights.dim() and len(weights) == 1 else rows
    shapes = {"values": [rows, k], "indices": [rows, k], "b_dec": [x.shape[1]], "weights": [alike, k + 1]}
    for (name, shape), tensor in zip(shapes.items(), (values, indices, b_dec, weights), strict=True):
        if list(tensor.shape) != shape:
            raise InputError(f"`{name}` has shape {list(tensor.shape)}, which does not fit x of {list(x.shape)}.")
    if indices.is_floating_point() or weights.requires_grad:
        raise InputError("`indices` must be integers, and `weights` constants.")
    _latents_only(indices, len(W_dec))
    return _PrefixLoss.apply(x, values, indices, W_dec, b_dec, weights)


def _fits(x: Tensor, rows: Tensor) -> None:
    if x.dim() != 2 or rows.dim() != 2 or x.shape[1] != rows.shape[1]:
        raise InputError(
            f"x of shape {list(x.shape)} does not fit weights of {list(rows.shape)}: it must be [batch, d_model]."
        )
    if not x.is_floating_point():
        raise InputError(f"x must be of a floating dtype, not {x.dtype}.")


def _latents_only(indices: Tensor, latents: int) -> None:
    """An index out of bounds would write into memory that belongs to something else."""
    if indices.numel() and indices.device.type == "cuda":
        torch._assert_async(((indices >= 0) & (indices < latents)).all())
    elif indices.numel():
        least, largest = map(int, torch.aminmax(indices))
        if least < 0 or largest >= latents:
            wrong = least if least < 0 else largest
            raise InputError(f"`indices` holds {wrong}, which is no latent: 0 to {latents - 1}.")


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
                x_here = x.detach()
                leaves = [t.detach().requires_grad_() for t in (values, W_dec, b_dec)]
                loss = naive.prefix_loss(x_here, leaves[0], indices, leaves[1], leaves[2], weights)
                gradients = list(torch.autograd.grad(loss, leaves))
        else:
            loss, *gradients = backend.prefix_gradients(x, values, indices, W_dec, b_dec, weights)
        if ctx.needs_input_grad[0]:
            # 2 sum_j w_j (x - x_hat_j): a latent is in all prefixes longer than its rank.
            above = weights.flip(1).cumsum(1).flip(1)[:, 1:].expand_as(values)
            share = (values * above).to(W_dec.dtype)
            summed = F.embedding_bag(indices, W_dec, per_sample_weights=share, mode="sum")
            gradients.append(2 * (weights.sum(1, keepdim=True) * (x - b_dec) - summed))
        ctx.save_for_backward(*(g.to(t.dtype) for g, t in zip(gradients, (values, W_dec, b_dec, x), strict=False)))
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_values, d_W, d_b, *d_x = (upstream[0] * gradient for gradient in ctx.saved_tensors)
        return d_x[0] if d_x else None, d_values, None, d_W, d_b, None
