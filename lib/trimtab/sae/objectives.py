"""What an SAE is trained for: one sparsity (TopK) or every sparsity up to K at once (HierarchicalTopK)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.sae.model import SAE, Latents, weighted_rows


def topk_loss(x: Float[Tensor, "batch d_model"], latents: Latents, sae: SAE) -> Float[Tensor, ""]:
    """mean((x - x_hat_K)^2) over rows and dimensions: reconstruction from all K latents given."""
    return (weighted_rows(latents, sae.W_dec) + sae.b_dec - x).square().mean()


def hierarchical_loss(x: Float[Tensor, "batch d_model"], latents: Latents, sae: SAE) -> Float[Tensor, ""]:
    """mean over j = 1..K of mean((x - x_hat_j)^2), x_hat_j from the j largest latents (HierarchicalTopK, section 3).

    Exact for every j, in memory O(batch d_model): the rows of the decoder are visited rank by rank, and the gradients
    are gathered on the way back, where S_t = sum over j >= t of dL/dx_hat_j gives

        dL/dv_t = <e_t, S_t>,  dL/dW_dec[i_t] += v_t S_t,  dL/db_dec = S_1.
    """
    return _Hierarchical.apply(x, latents.values, latents.indices, sae.W_dec, sae.b_dec)


OBJECTIVES = {"topk": topk_loss, "hierarchical": hierarchical_loss}

CHUNK = 256
"""Rows worked on at once on a CPU: their prefixes stay in its cache. A GPU takes all rows."""


class _Hierarchical(torch.autograd.Function):
    """Computes the loss and its gradients in one go, since both walk the same prefixes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        rows, k = values.shape
        per_term = 1.0 / (x.numel() * k)
        d_values, d_W, d_b = torch.empty_like(values), torch.zeros_like(W_dec), torch.zeros_like(b_dec)
        loss = torch.zeros((), dtype=x.dtype, device=x.device)
        chunk = CHUNK if x.device.type == "cpu" else rows
        for first in range(0, rows, chunk):
            part = slice(first, first + chunk)
            # Ranks first, so that each step reads a contiguous column.
            v, i = values[part].T.contiguous(), indices[part].T.contiguous()
            residual = b_dec - x[part]
            for t in range(k):
                residual = torch.addcmul(residual, W_dec[i[t]], v[t, :, None])
                loss += residual.square().sum()
            suffix = torch.zeros_like(residual)
            for t in reversed(range(k)):
                direction = W_dec[i[t]]
                suffix.add_(residual)
                d_values[part, t] = torch.einsum("bd,bd->b", direction, suffix)
                d_W.index_add_(0, i[t], suffix * v[t, :, None])
                residual.addcmul_(direction, v[t, :, None], value=-1)
            d_b += suffix.sum(dim=0)
        ctx.save_for_backward(d_values.mul_(2 * per_term), d_W.mul_(2 * per_term), d_b.mul_(2 * per_term))
        return loss * per_term

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_values, d_W, d_b = ctx.saved_tensors
        return None, upstream[0] * d_values, None, upstream[0] * d_W, upstream[0] * d_b
