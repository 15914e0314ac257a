"""A sparse autoencoder whose sparsity is chosen when it is read: encode to the k largest latents, decode any prefix."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.checkpoint import atomic, load_tensors, read_json, save_tensors, write_json
from trimtab.errors import InputError
from trimtab.sae import kernels

WEIGHTS, CONFIG = "sae.safetensors", "config.json"
FORMAT = 1


class Latents(NamedTuple):
    """The active latents of each row, largest first; every prefix is the code at a smaller budget."""

    values: Float[Tensor, "*rows k"]
    """Non-negative activations in descending order; zeros fill rows that have fewer."""
    indices: Int[Tensor, "*rows k"]
    """Which latent each is."""

    def prefix(self, k: int) -> "Latents":
        """The k largest."""
        return Latents(self.values[..., :k], self.indices[..., :k])

    def descending(self) -> "Latents":
        """The same latents, largest first: themselves where they are in that order already."""
        if bool((self.values[..., 1:] <= self.values[..., :-1]).all()):
            return self
        values, order = self.values.sort(dim=-1, descending=True, stable=True)
        return Latents(values, self.indices.gather(-1, order))


class SAE(nn.Module):
    """l = TopK(ReLU(W_enc x + b_enc)), x_hat = W_dec l + b_dec (HierarchicalTopK, section 3; Gao et al. 2024).

    Decoder rows `W_dec[i]` are the feature directions, kept at unit norm in training. In training the inputs are
    normalised activations, centred on the data mean; `fold` makes of it an SAE for the model's own residual stream,
    which is what is saved.

    `k` is the largest budget it was trained for, and the default of `encode`. `thresholds` maps a budget to the
    activation above which that many latents fire on average (`evaluation.calibrate`). A JumpReLU SAE (Rajamanoharan
    et al. 2024) has a threshold for each latent, `log_threshold`, and latents at or below it are zero.
    """

    def __init__(
        self, d_model: int, latents: int, k: int, *, jump: bool = False, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if not 1 <= k <= latents:
            raise InputError(f"An SAE of {latents} latents cannot have a budget of k = {k}.")
        # The encoder starts as the decoder (Gao et al. 2024, appendix A), but at half its length: the largest of an
        # overcomplete dictionary's projections overlap, and at full length their sum overshoots.
        directions = F.normalize(torch.randn(latents, d_model, generator=generator), dim=1)
        self.W_enc = nn.Parameter(0.5 * directions)
        self.W_dec = nn.Parameter(directions)
        self.b_enc = nn.Parameter(torch.zeros(latents))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.log_threshold = nn.Parameter(torch.zeros(latents)) if jump else None
        self.k = k
        self.thresholds: dict[int, float] = {}

    @property
    def latents(self) -> int:
        """Size of the dictionary."""
        return len(self.W_dec)

    @property
    def d_model(self) -> int:
        """Width of what it reads."""
        return self.W_dec.shape[1]

    def forward(
        self, x: Float[Tensor, "*rows d_model"], k: int | None = None, *, threshold: float | None = None
    ) -> Float[Tensor, "*rows d_model"]:
        """The reconstruction from the latents that `encode` finds."""
        return self.decode(self.encode(x, k, threshold=threshold))

    def encode(
        self,
        x: Float[Tensor, "*rows d_model"],
        k: int | None = None,
        *,
        threshold: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> Latents:
        """The k largest latents of each row, or, with `threshold`, all latents above it, at most k where k is given.

        x: any leading dimensions, which the latents keep, and any floating dtype, in which the values come. `dtype`:
        precision of the matrix product (default: that of the weights). A threshold lets rows differ in their number of
        latents; the widest sets the width and zeros fill the others; below 0 it is 0. The gradient is that of the
        values, at x, W_enc and b_enc. A row that holds a NaN has only NaN. Raises InputError for a k, a threshold or a
        width that cannot be.
        """
        if x.dim() == 0 or x.shape[-1] != self.d_model or not x.is_floating_point():
            raise InputError(
                f"An SAE of width {self.d_model} reads rows of floating-point numbers, (..., {self.d_model}), not "
                f"{x.dtype} of shape {tuple(x.shape)}."
            )
        if k is not None and not 1 <= k <= self.latents:
            raise InputError(f"k must lie between 1 and the dictionary's {self.latents} latents, not {k}.")
        if threshold is not None and math.isnan(threshold):
            raise InputError("threshold must be a number, not NaN.")
        rows = x.reshape(-1, self.d_model)
        if threshold is None and self.log_threshold is None:
            values, indices = kernels.encode(rows, self.W_enc, self.b_enc, k or self.k, dtype)
        else:
            values, indices = self._above(rows, k, threshold, dtype)
        shape = (*x.shape[:-1], values.shape[1])
        return Latents(values.view(shape), indices.view(shape))

    def _above(
        self, x: Float[Tensor, "batch d_model"], k: int | None, threshold: float | None, dtype: torch.dtype | None
    ) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
        kind = dtype or self.W_enc.dtype
        pre = F.linear(x.to(kind), self.W_enc.to(kind), self.b_enc.to(kind))
        with torch.no_grad():
            if threshold is None and self.log_threshold is not None:
                bar: Tensor | float = self.log_threshold.exp()
            else:
                bar = max(threshold or 0.0, 0.0)
            active = torch.where(pre > bar, pre, 0)
            widest = max(1, int((active > 0).sum(dim=1).max())) if len(x) else 1
            chosen, indices = active.topk(min(k or widest, widest), dim=1)
            broken = pre.isnan().any(dim=1, keepdim=True)
        values = torch.where(chosen > 0, pre.gather(1, indices), 0)
        return torch.where(broken, torch.nan, values).to(x.dtype), indices

    def decode(self, latents: Latents) -> Float[Tensor, "*rows d_model"]:
        """b_dec plus the weighted decoder rows of the given latents, in the dtype of their values; only those rows are
        read."""
        k = latents.values.shape[-1]
        flat = Latents(latents.values.reshape(-1, k).to(self.W_dec.dtype), latents.indices.reshape(-1, k))
        x_hat = weighted_rows(flat, self.W_dec) + self.b_dec
        return x_hat.to(latents.values.dtype).view(*latents.values.shape[:-1], self.d_model)

    def fold(self, mean: Float[Tensor, " d_model"], scale: float) -> "SAE":
        """The same SAE for inputs *before* the normalisation (x - mean) * scale that it was trained on.

        Latents come out divided by `scale`, reconstructions in the units of the input; directions do not change.
        """
        folded = _blank(self.d_model, self.latents, self.k, self.log_threshold is not None).to(self.W_dec.device)
        with torch.no_grad():
            folded.W_enc.copy_(self.W_enc)
            folded.W_dec.copy_(self.W_dec)
            mean = mean.to(self.W_dec)
            folded.b_enc.copy_(self.b_enc / scale - (self.W_enc.double() @ mean.double()).to(self.b_enc))
            folded.b_dec.copy_(self.b_dec / scale + mean)
            if folded.log_threshold is not None and self.log_threshold is not None:
                folded.log_threshold.copy_(self.log_threshold - torch.tensor(scale).log())
        folded.thresholds = {k: threshold / scale for k, threshold in self.thresholds.items()}
        return folded.train(self.training)

    def unfold(self, mean: Float[Tensor, " d_model"], scale: float) -> "SAE":
        """Inverse of `fold`: the same SAE for inputs *after* the normalisation (x - mean) * scale."""
        return self.fold(-mean * scale, 1 / scale)

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Remove from the decoder's gradient the part along each row, which `normalise_decoder` would undo anyway."""
        if self.W_dec.grad is not None:
            along = torch.einsum("fd,fd->f", self.W_dec.grad, self.W_dec)
            self.W_dec.grad.addcmul_(along[:, None], self.W_dec, value=-1)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Scale decoder rows to unit norm; a row of zeros has no direction, and stays."""
        norms = self.W_dec.norm(dim=1, keepdim=True)
        self.W_dec.div_(torch.where(norms > 0, norms, 1))

    def save_pretrained(self, folder: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
        """Write `sae.safetensors` and `config.json` into `folder`, whose other files stay.

        `metadata` (model, site, arm, ...) is kept in the configuration under its own key. Raises InputError where a
        file of one of these names is there that Trimtab did not write.
        """
        config = {
            "format": FORMAT, "d_model": self.d_model, "latents": self.latents, "k": self.k,
            "activation": "topk" if self.log_threshold is None else "jumprelu",
            "thresholds": {str(k): threshold for k, threshold in sorted(self.thresholds.items())},
            "metadata": dict(metadata or {}),
        }  # fmt: skip
        with atomic(Path(folder), "sae") as partial:
            partial.mkdir(parents=True)
            save_tensors(partial / WEIGHTS, self.state_dict())
            write_json(partial / CONFIG, config)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> "SAE":
        """Read what `save_pretrained` wrote. Raises InputError where a file is missing or they do not fit together."""
        config = read_config(folder)
        tensors, _ = load_tensors(Path(folder) / WEIGHTS, device)
        sae = _blank(config["d_model"], config["latents"], config["k"], config["activation"] == "jumprelu").to(device)
        try:
            sae.load_state_dict(tensors)
        except RuntimeError as error:
            raise InputError(
                f"{folder}: {WEIGHTS} does not fit {CONFIG} ({str(error).splitlines()[-1].strip()})."
            ) from None
        sae.thresholds = {int(k): float(threshold) for k, threshold in config["thresholds"].items()}
        return sae.eval()


def _blank(d_model: int, latents: int, k: int, jump: bool) -> SAE:
    """An SAE whose weights are to be replaced: torch's own generator is left as it was."""
    return SAE(d_model, latents, k, jump=jump, generator=torch.Generator())


def read_config(folder: str | Path) -> dict[str, Any]:
    """The `config.json` of a saved SAE, with its `metadata`, without reading any weights."""
    config = read_json(Path(folder) / CONFIG)
    if config.get("format") != FORMAT:
        raise InputError(
            f"{Path(folder) / CONFIG} is not an SAE of Trimtab's format {FORMAT}: see trimtab.sae.exchange."
        )
    return config


def weighted_rows(latents: Latents, W_dec: Float[Tensor, "latents d_model"]) -> Float[Tensor, "batch d_model"]:
    """Sum of v_i W_dec[i] over each row's latents, without a [batch, k, d_model] intermediate."""
    weights = latents.values.contiguous()
    return F.embedding_bag(latents.indices.contiguous(), W_dec, per_sample_weights=weights, mode="sum")
