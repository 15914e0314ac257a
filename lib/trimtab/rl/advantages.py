"""Advantages of a group of completions of one prompt, from their rewards."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

Rewards = Float[Tensor, "prompts group"]


def rloo(rewards: Rewards, baseline: float = 0.0) -> Rewards:
    """r_i - mean of the other rewards of its group (Ahmadian et al. 2024), which do not depend on it."""
    group = rewards.shape[1]
    return (rewards - rewards.mean(dim=1, keepdim=True)) * group / (group - 1)


def reinforce(rewards: Rewards, baseline: float = 0.0) -> Rewards:
    """r_i alone (Williams 1992)."""
    return rewards.clone()


def reinforce_with_baseline(rewards: Rewards, baseline: float = 0.0) -> Rewards:
    """r_i - a running mean of the rewards of earlier batches."""
    return rewards - baseline


def grpo(rewards: Rewards, baseline: float = 0.0) -> Rewards:
    """(r_i - mean) / (std + 1e-4) over the group (Shao et al. 2024)."""
    return grpo_no_std(rewards) / (rewards.std(dim=1, keepdim=True) + 1e-4)


def grpo_no_std(rewards: Rewards, baseline: float = 0.0) -> Rewards:
    """r_i - mean over the group: RLOO but for the factor G / (G - 1) (Liu et al. 2025)."""
    return rewards - rewards.mean(dim=1, keepdim=True)


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
    return (rewards.max(dim=1).values > rewards.min(dim=1).values).float().mean()


def pass_at_k(correct: Float[Tensor, "items samples"], k: int) -> Float[Tensor, " items"]:
    """Probability that k of the samples, drawn without replacement, hold a right one: 1 - C(n-c, k) / C(n, k), the
    unbiased estimate of Chen et al. 2021."""
    n = correct.shape[1]
    wrong = n - correct.sum(dim=1)
    steps = torch.arange(k, dtype=wrong.dtype, device=wrong.device)
    return 1 - ((wrong[:, None] - steps).clamp(min=0) / (n - steps)).prod(dim=1)
