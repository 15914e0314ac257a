"""A sparse autoencoder whose sparsity is chosen when it is read: encode to the k largest latents, decode any prefix."""

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

    values: Float[Tensor, "batch k"]
    """Non-negative activations in descending order; zeros fill rows that have fewer."""
    indices: Int[Tensor, "batch k"]
    """Which latent each is."""

    def prefix(self, k: int) -> "Latents":
        """The k largest."""
        return Latents(self.values[:, :k], self.indices[:, :k])

    def descending(self) -> "Latents":
        """The same latents, largest first: themselves where they are in that order already."""
        if bool((self.values[:, 1:] <= self.values[:, :-1]).all()):
            return self
        values, order = self.values.sort(dim=1, descending=True, stable=True)
        return Latents(values, self.indices.gather(1, order))


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

    def encode(
        self,
        x: Float[Tensor, "batch d_model"],
        k: int | None = None,
        *,
        threshold: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> Latents:
        """The k largest latents of each row, or, with `threshold`, all latents above it, at most k where k is given.

        A threshold lets rows differ in their number of latents; the widest sets the width and zeros fill the others.
        `dtype`: precision of the matrix product (default: that of the weights).
        """
        if k is not None and not 1 <= k <= self.latents:
            raise InputError(f"k must lie between 1 and the dictionary's {self.latents} latents, not {k}.")
        if threshold is not None:
            bar = x.new_tensor(threshold)
        elif self.log_threshold is not None:
            bar = self.log_threshold.exp()
        else:
            return Latents(*kernels.encode(x, self.W_enc, self.b_enc, k or self.k, dtype))
        with torch.no_grad():
            kind = dtype or self.W_enc.dtype
            pre = F.linear(x.to(kind), self.W_enc.to(kind), self.b_enc.to(kind))
            pre = torch.where(pre > bar, pre, 0)
            widest = max(1, int((pre > 0).sum(dim=1).max()))
        values, indices = pre.topk(min(k or widest, widest), dim=1)
        return Latents(values.to(x.dtype), indices)

    def decode(self, latents: Latents) -> Float[Tensor, "batch d_model"]:
        """b_dec plus the weighted decoder rows of the given latents; only those rows are read."""
        return weighted_rows(latents, self.W_dec) + self.b_dec

    def fold(self, mean: Float[Tensor, " d_model"], scale: float) -> "SAE":
        """The same SAE for inputs *before* the normalisation (x - mean) * scale that it was trained on.

        Latents come out divided by `scale`, reconstructions in the units of the input; directions do not change.
        """
        folded = SAE(self.d_model, self.latents, self.k, jump=self.log_threshold is not None).to(self.W_dec.device)
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
        """Scale decoder rows to unit norm."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))

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
        sae = cls(config["d_model"], config["latents"], config["k"], jump=config["activation"] == "jumprelu").to(device)
        try:
            sae.load_state_dict(tensors)
        except RuntimeError as error:
            raise InputError(
                f"{folder}: {WEIGHTS} does not fit {CONFIG} ({str(error).splitlines()[-1].strip()})."
            ) from None
        sae.thresholds = {int(k): float(threshold) for k, threshold in config["thresholds"].items()}
        return sae.eval()


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
