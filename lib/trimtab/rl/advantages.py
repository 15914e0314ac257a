"""Advantages of a group of completions of one prompt, from their rewards.

Rewards that are no finite numbers are those of completions that nobody could judge: each has an advantage of 0, and the
others of its group are compared as if it had not been drawn. Where all that were judged earned the same there is
nothing to learn, and every advantage is 0, to the bit, under every estimator.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

Rewards = Float[Tensor, "prompts group"]


def rloo(rewards: Rewards, baseline: float = 0.0) -> Rewards:
    """r_i - mean of the other rewards of its group (Ahmadian et al. 2024), which do not depend on it."""
    count = rewards.isfinite().sum(dim=1, keepdim=True)
    return grpo_no_std(rewards) * count / (count - 1).clamp(min=1)


def reinforce(rewards: Rewards, baseline: float = 0.0) -> Rewards:
    """r_i alone (Williams 1992)."""
    return reinforce_with_baseline(rewards)


def reinforce_with_baseline(rewards: Rewards, baseline: float = 0.0) -> Rewards:
    """r_i - a running mean of the rewards of earlier batches."""
    return _learnt(rewards - baseline, rewards, (0, 1))


def grpo(rewards: Rewards, baseline: float = 0.0) -> Rewards:
    """(r_i - mean) / (std + 1e-4) over the group (Shao et al. 2024)."""
    apart = grpo_no_std(rewards)
    count = rewards.isfinite().sum(dim=1, keepdim=True)
    return apart / ((apart.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt() + 1e-4)


def grpo_no_std(rewards: Rewards, baseline: float = 0.0) -> Rewards:
    """r_i - mean over the group: RLOO but for the factor G / (G - 1) (Liu et al. 2025)."""
    judged = rewards.isfinite()
    mean = torch.where(judged, rewards, 0).sum(dim=1, keepdim=True) / judged.sum(dim=1, keepdim=True).clamp(min=1)
    return _learnt(rewards - mean, rewards, 1)


ESTIMATORS: Mapping[str, Callable[[Rewards, float], Rewards]] = {
    "rloo": rloo,
    "reinforce": reinforce,
    "reinforce_with_baseline": reinforce_with_baseline,
    "grpo": grpo,
    "grpo_no_std": grpo_no_std,
}
"""By the name that a configuration gives them."""


def informative(rewards: Rewards) -> Float[Tensor, ""]:
    """Share of groups whose rewards differ: the others teach nothing to an estimator that centres by group."""
    return _differ(rewards, 1).float().mean()


def _learnt(advantages: Rewards, rewards: Rewards, among: int | tuple[int, ...]) -> Rewards:
    """The advantages of completions that were judged, where judged ones differ along the dimensions `among`."""
    return torch.where(rewards.isfinite() & _differ(rewards, among), advantages, 0.0)


def _differ(rewards: Rewards, among: int | tuple[int, ...]) -> Tensor:
    judged = rewards.isfinite()
    most = torch.where(judged, rewards, -torch.inf).amax(dim=among, keepdim=True)
    return most > torch.where(judged, rewards, torch.inf).amin(dim=among, keepdim=True)


def pass_at_k(correct: Float[Tensor, "items samples"], k: int) -> Float[Tensor, " items"]:
    """Probability that k of the samples, drawn without replacement, hold a right one: 1 - C(n-c, k) / C(n, k), the
    unbiased estimate of Chen et al. 2021."""
    n = correct.shape[1]
    wrong = n - correct.sum(dim=1)
    steps = torch.arange(k, dtype=wrong.dtype, device=wrong.device)
    return 1 - ((wrong[:, None] - steps).clamp(min=0) / (n - steps)).prod(dim=1)
