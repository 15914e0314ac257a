"""What an SAE is trained for: one sparsity, a few, or every sparsity at once; each objective is one small class.

All share the encoder and the decoder loss of `trimtab.sae.kernels`: an objective selects latents and puts a weight on
each of their prefixes. Losses are mean squares over rows and dimensions, so that predicting the mean scores 1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.errors import InputError
from trimtab.sae import kernels
from trimtab.sae.model import SAE, Latents


class Loss(NamedTuple):
    """One step's loss, and the latents that were active in it."""

    value: Float[Tensor, ""]
    latents: Latents


@runtime_checkable
class Objective(Protocol):
    """What the training loop asks of an objective."""

    @property
    def k(self) -> int:
        """The largest budget it is trained for."""

    @property
    def budgets(self) -> Mapping[int, float]:
        """Budgets at which its own loss reads an SAE, with their weights; a learning rate is judged by them."""

    def __call__(self, x: Float[Tensor, "batch d_model"], sae: SAE, dtype: torch.dtype | None) -> Loss:
        """The loss of a batch; the encoder's product is computed in `dtype`."""


@dataclass(frozen=True)
class TopK:
    """mean((x - x_hat_k)^2): reconstruction from the k largest latents (Gao et al. 2024)."""

    k: int

    @property
    def budgets(self) -> Mapping[int, float]:
        """k alone."""
        return {self.k: 1.0}

    def __call__(self, x: Float[Tensor, "batch d_model"], sae: SAE, dtype: torch.dtype | None) -> Loss:
        """See the class."""
        latents = sae.encode(x, self.k, dtype=dtype)
        return Loss(prefix_loss(x, latents, sae, self.budgets), latents)


@dataclass(frozen=True)
class MultiTopK:
    """L(k / 4) + L(k) / 8: two budgets (Gao et al. 2024, appendix)."""

    k: int
    """The larger budget."""

    def __post_init__(self) -> None:
        if self.k % 4:
            raise InputError(f"multitopk: k must be a multiple of 4, for k / 4 is the other budget, not {self.k}.")

    @property
    def budgets(self) -> Mapping[int, float]:
        """Both."""
        return {self.k // 4: 1.0, self.k: 1 / 8}

    def __call__(self, x: Float[Tensor, "batch d_model"], sae: SAE, dtype: torch.dtype | None) -> Loss:
        """See the class."""
        latents = sae.encode(x, self.k, dtype=dtype)
        return Loss(prefix_loss(x, latents, sae, self.budgets), latents)


@dataclass(frozen=True)
class Hierarchical:
    """sum over j in J of w_j mean((x - x_hat_j)^2), x_hat_j from the j largest latents (HierarchicalTopK, section 3).

    The paper's loss is the default, J = 1..k with weights 1 / k. Exact for every j, in memory O(batch d_model).
    """

    k: int
    weights: Mapping[int, float] | None = None
    """J and its weights, {j: w_j}; None: all of 1..k alike."""

    def __post_init__(self) -> None:
        if self.weights is not None and (not self.weights or not 1 <= min(self.weights) <= max(self.weights) == self.k):
            raise InputError(f"hierarchical: J must lie in 1..k and hold k = {self.k}, not {sorted(self.weights)}.")

    @classmethod
    def powers_of_two(cls, k: int) -> "Hierarchical":
        """J = {1, 2, 4, ..., k}, alike: the coarse J of MSAE (Zaigrajew et al. 2025) over activation ranks."""
        budgets = sorted({*(1 << i for i in range(k.bit_length())), k})
        return cls(k, dict.fromkeys(budgets, 1 / len(budgets)))

    @classmethod
    def powers_of_two_by_gap(cls, k: int) -> "Hierarchical":
        """The same J, each weighted by its distance from the one before: what it costs to sum over fewer prefixes.

        Alike, the members of a coarse J favour small budgets: those above k / 2 share 1 / |J| instead of a half.
        """
        budgets = [0, *sorted(cls.powers_of_two(k).budgets)]
        return cls(k, {j: (j - before) / k for before, j in pairwise(budgets)})

    @property
    def budgets(self) -> Mapping[int, float]:
        """J with its weights."""
        return self.weights or dict.fromkeys(range(1, self.k + 1), 1 / self.k)

    def __call__(self, x: Float[Tensor, "batch d_model"], sae: SAE, dtype: torch.dtype | None) -> Loss:
        """See the class."""
        latents = sae.encode(x, self.k, dtype=dtype)
        return Loss(prefix_loss(x, latents, sae, self.budgets), latents)


@dataclass(frozen=True)
class BatchTopK:
    """As TopK, but the batch * k largest activations of the whole batch are kept (Bussmann et al. 2024).

    Rows differ in their number of latents. Read by a threshold, or at any k like the others.
    """

    k: int

    @property
    def budgets(self) -> Mapping[int, float]:
        """k alone."""
        return {self.k: 1.0}

    def __call__(self, x: Float[Tensor, "batch d_model"], sae: SAE, dtype: torch.dtype | None) -> Loss:
        """See the class."""
        latents = batch_topk(x, sae, self.k, dtype)
        return Loss(prefix_loss(x, latents, sae, {latents.values.shape[1]: 1.0}), latents)


@dataclass(frozen=True)
class Matryoshka:
    """BatchTopK over nested dictionaries: mean over groups g of mean((x - x_hat_g)^2) (Bussmann et al. 2025).

    x_hat_g uses the active latents among the first `nested[g]` of the dictionary. Where HierarchicalTopK nests by rank,
    this nests by index.
    """

    k: int
    shares: tuple[float, ...] = field(default=(1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0))
    """Sizes of the nested dictionaries, as shares of the whole."""

    @property
    def budgets(self) -> Mapping[int, float]:
        """k alone."""
        return {self.k: 1.0}

    def __call__(self, x: Float[Tensor, "batch d_model"], sae: SAE, dtype: torch.dtype | None) -> Loss:
        """See the class."""
        latents = batch_topk(x, sae, self.k, dtype)
        # In order of the dictionary, every nested dictionary is a prefix; inactive entries go to the end.
        places = torch.where(latents.values > 0, latents.indices, sae.latents)
        places, order = places.sort(dim=1, stable=True)
        ordered = Latents(latents.values.gather(1, order), latents.indices.gather(1, order))
        bounds = torch.tensor([round(share * sae.latents) for share in self.shares], device=x.device)
        lengths = torch.searchsorted(places, bounds.expand(len(x), -1).contiguous())
        weights = torch.zeros(len(x), places.shape[1] + 1, device=x.device)
        weights.scatter_add_(1, lengths, torch.full(lengths.shape, 1 / (len(bounds) * x.numel()), device=x.device))
        return Loss(kernels.prefix_loss(x, *ordered, sae.W_dec, sae.b_dec, weights), latents)


@dataclass(frozen=True)
class JumpReLU:
    """mean((x - x_hat)^2) + weight (L0 / k - 1)^2, latents above a learnt threshold each (Rajamanoharan et al. 2024).

    The penalty that steers L0 to k is that of Conerly et al. 2025. Thresholds learn through a rectangle of width
    `bandwidth` around them (section 3 of the paper), as a share of the threshold, for scales differ.
    """

    k: int
    weight: float = 0.1
    bandwidth: float = 0.2

    @property
    def budgets(self) -> Mapping[int, float]:
        """k alone."""
        return {self.k: 1.0}

    def __call__(self, x: Float[Tensor, "batch d_model"], sae: SAE, dtype: torch.dtype | None) -> Loss:
        """See the class. Dense: early in training a large part of the dictionary is active."""
        if sae.log_threshold is None:
            raise InputError("jumprelu: the SAE has no thresholds: make it with SAE(..., jump=True).")
        kind = dtype or x.dtype
        pre = torch.nn.functional.linear(x.to(kind), sae.W_enc.to(kind), sae.b_enc.to(kind)).to(x.dtype)
        acts, steps = _Jump.apply(pre, sae.log_threshold.exp(), self.bandwidth)
        x_hat = (acts.to(kind) @ sae.W_dec.to(kind)).to(x.dtype) + sae.b_dec
        penalty = self.weight * (steps.sum(dim=1).mean() / self.k - 1).square()
        values, indices = acts.detach().topk(min(4 * self.k, sae.latents), dim=1)
        return Loss((x - x_hat).square().mean() + penalty, Latents(values, indices))


def prefix_loss(
    x: Float[Tensor, "batch d_model"], latents: Latents, sae: SAE, budgets: Mapping[int, float]
) -> Float[Tensor, ""]:
    """sum over j of budgets[j] mean((x - x_hat_j)^2), x_hat_j from the j largest of the latents given.

    Latents that are not in descending order are sorted first.
    """
    latents = latents.descending()
    weights = torch.zeros(1, latents.values.shape[1] + 1, dtype=sae.W_dec.dtype, device=x.device)
    for j, weight in budgets.items():  # where rows have fewer latents, all of them are the prefix
        weights[0, min(j, latents.values.shape[1])] += weight / x.numel()
    return kernels.prefix_loss(x, latents.values, latents.indices, sae.W_dec, sae.b_dec, weights)


def batch_topk(x: Float[Tensor, "batch d_model"], sae: SAE, k: int, dtype: torch.dtype | None) -> Latents:
    """The batch * k largest activations of a batch; zeros fill the rows that got fewer than others."""
    width = min(4 * k, sae.latents)
    while True:
        values, indices = sae.encode(x, width, dtype=dtype)
        flat = values.detach().flatten()
        bar = flat.kthvalue(len(flat) - len(x) * k + 1).values
        # A row whose last entry is kept may have lost a later one: look further. (Ties at the bar are all kept.)
        if width == sae.latents or not bool((values[:, -1] >= bar).logical_and(values[:, -1] > 0).any()):
            return Latents(torch.where(values >= bar, values, 0), indices)
        width = min(2 * width, sae.latents)


class _Jump(torch.autograd.Function):
    """(pre where pre > threshold, whether it is), with the pseudo-derivatives of Rajamanoharan et al., section 3."""

    @staticmethod
    def forward(ctx, pre: Tensor, threshold: Tensor, bandwidth: float):  # type: ignore[no-untyped-def]
        active: Bool[Tensor, "batch latents"] = pre > threshold
        ctx.save_for_backward(pre, threshold, active)
        ctx.bandwidth = bandwidth
        return torch.where(active, pre, 0), active.to(pre.dtype)

    @staticmethod
    def backward(ctx, d_acts: Tensor, d_steps: Tensor):  # type: ignore[no-untyped-def]
        pre, threshold, active = ctx.saved_tensors
        width = ctx.bandwidth * threshold
        near = (pre - threshold).abs() < width / 2
        d_threshold = -torch.where(near, d_acts * threshold + d_steps, 0).sum(dim=0) / width
        return torch.where(active, d_acts, 0), d_threshold, None


OBJECTIVES: Mapping[str, Callable[[int], Objective]] = {
    "topk": TopK,
    "multitopk": MultiTopK,
    "batchtopk": BatchTopK,
    "matryoshka": Matryoshka,
    "jumprelu": JumpReLU,
    "hierarchical-pow2": Hierarchical.powers_of_two,
    "hierarchical-pow2gap": Hierarchical.powers_of_two_by_gap,
    "hierarchical": Hierarchical,
}
"""By the name that an arm gives them: `hierarchical-pow2-64` is HierarchicalTopK with J = powers of two up to 64."""
