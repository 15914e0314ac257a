"""A sparse autoencoder whose sparsity is chosen when it is read: encode to the k largest latents, decode any prefix."""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.checkpoint import load_tensors, save_tensors


class Latents(NamedTuple):
    """The active latents of each row, largest first; every prefix is the code at a smaller budget."""

    values: Float[Tensor, "batch k"]
    """Non-negative activations in descending order."""
    indices: Int[Tensor, "batch k"]
    """Which latent each is."""

    def prefix(self, k: int) -> "Latents":
        """The k largest."""
        return Latents(self.values[:, :k], self.indices[:, :k])


class SAE(nn.Module):
    """l = TopK(ReLU(W_enc x + b_enc)), x_hat = W_dec l + b_dec (HierarchicalTopK, section 3; Gao et al. 2024).

    Decoder rows `W_dec[i]` are the feature directions, kept at unit norm in training. The inputs are normalised
    activations as `ActivationCache` serves them.
    """

    def __init__(self, d_model: int, latents: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        directions = F.normalize(torch.randn(latents, d_model, generator=generator), dim=1)
        self.W_dec = nn.Parameter(directions)
        self.W_enc = nn.Parameter(directions.clone())
        self.b_enc = nn.Parameter(torch.zeros(latents))
        self.b_dec = nn.Parameter(torch.zeros(d_model))

    @property
    def latents(self) -> int:
        """Size of the dictionary."""
        return len(self.W_dec)

    def encode(self, x: Float[Tensor, "batch d_model"], k: int, dtype: torch.dtype | None = None) -> Latents:
        """The k largest latents of each row. `dtype`: precision of the matrix product (default: as the weights)."""
        if dtype is None:
            pre = F.linear(x, self.W_enc, self.b_enc)
        else:
            pre = F.linear(x.to(dtype), self.W_enc.to(dtype), self.b_enc.to(dtype))
        values, indices = F.relu(pre).topk(k, dim=1, sorted=True)
        return Latents(values.to(x.dtype), indices)

    def decode(self, latents: Latents) -> Float[Tensor, "batch d_model"]:
        """b_dec plus the weighted decoder rows of the given latents; only those rows are read."""
        return weighted_rows(latents, self.W_dec) + self.b_dec

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Remove from the decoder's gradient the part along each row, which `normalise_decoder` would undo anyway."""
        if self.W_dec.grad is not None:
            along = torch.einsum("fd,fd->f", self.W_dec.grad, self.W_dec)
            self.W_dec.grad.addcmul_(along[:, None], self.W_dec, value=-1)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Scale decoder rows to unit norm."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the weights as safetensors."""
        save_tensors(path, self.state_dict(), metadata)

    @classmethod
    def load(cls, path: Path) -> "SAE":
        """Read the weights back."""
        tensors, _ = load_tensors(path)
        sae = cls(tensors["W_dec"].shape[1], tensors["W_dec"].shape[0])
        sae.load_state_dict(tensors)
        return sae


def weighted_rows(latents: Latents, W_dec: Float[Tensor, "latents d_model"]) -> Float[Tensor, "batch d_model"]:
    """Sum of v_i W_dec[i] over each row's latents, without a [batch, k, d_model] intermediate."""
    weights = latents.values.contiguous()
    return F.embedding_bag(latents.indices.contiguous(), W_dec, per_sample_weights=weights, mode="sum")
