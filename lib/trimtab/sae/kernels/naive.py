"""The definition of every kernel, for reading and for tests: all prefixes materialised, gradients left to autograd."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def select(pre: Float[Tensor, "batch latents"], k: int) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """(values, indices) of the k largest of ReLU(pre) in each row, descending; of equals, the lower index first."""
    values, indices = F.relu(pre).sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


def prefix_loss(
    x: Float[Tensor, "batch d_model"],
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "latents d_model"],
    b_dec: Float[Tensor, " d_model"],
    weights: Float[Tensor, "rows prefixes"],
) -> Float[Tensor, ""]:
    """sum over rows and over j = 0..k of weights[., j] ||x - x_hat_j||^2 (HierarchicalTopK, section 3).

    x_hat_j = b_dec + sum over t < j of values[:, t] W_dec[indices[:, t]]: prefixes of the latents in the order given.
    `weights` is [1, k + 1], the same for all rows, or [batch, k + 1]; column 0 is the prefix that holds nothing.
    """
    steps = W_dec[indices] * values[..., None]
    prefixes = torch.cat([b_dec.expand(len(x), 1, -1), b_dec + steps.cumsum(dim=1)], dim=1)
    return (weights * (prefixes - x[:, None]).square().sum(dim=2)).sum()


def scatter_rows(
    coefficients: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    x: Float[Tensor, "batch d_model"],
    latents: int,
) -> Float[Tensor, "latents d_model"]:
    """Row i is the sum of coefficients[b, t] x[b] over all (b, t) with indices[b, t] = i: the encoder's gradient."""
    out = torch.zeros(latents, x.shape[1], dtype=x.dtype, device=x.device)
    return out.index_add(0, indices.flatten(), (coefficients[..., None] * x[:, None]).flatten(0, 1))
