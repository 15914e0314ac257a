"""How a policy is trained."""

from dataclasses import dataclass

from trimtab.rl.advantages import ESTIMATORS
from trimtab.validation import at_least, not_negative, one_of, positive, require


@dataclass(frozen=True)
class RLConfig:
    """On-policy policy gradient with verifiable rewards. The defaults are the bias-only paper's: RLOO, no KL, one
    update for each batch."""

    updates: int = 40
    """Batches of rollouts, with one optimiser step each unless `steps_per_batch` says more."""
    prompts: int = 8
    """Prompts in a batch."""
    group: int = 8
    """Completions of each prompt."""
    max_new_tokens: int = 12
    """Tokens after which a completion is cut off."""
    temperature: float = 1.0
    """Of sampling, and of the probabilities in the gradient."""
    estimator: str = "rloo"
    """rloo | reinforce | reinforce_with_baseline | grpo | grpo_no_std"""
    warm_up: float = 0.05
    """Share of the updates in which the learning rate rises linearly; it is constant afterwards."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    kl: float = 0.0
    """Weight of the KL penalty to the model before training; 0 runs no reference."""
    steps_per_batch: int = 1
    """Optimiser steps on each batch of rollouts; with more than one, importance ratios are clipped."""
    clip: float = 0.2
    """How far a ratio may move from 1 (PPO); used only with several steps on a batch."""
    rows: int = 1
    """Prompts, with their completions, in one backward pass: as few as keep the processor busy. On two cores one is
    faster than eight, and holds a fifth of the activations."""

    def __post_init__(self) -> None:
        at_least(1, self, "updates", "prompts", "max_new_tokens", "steps_per_batch", "rows", "group")
        one_of(ESTIMATORS, self, "estimator")
        if self.estimator in ("rloo", "grpo", "grpo_no_std"):
            rule = f"at least 2, as {self.estimator} compares completions of a prompt"
            require(self.group >= 2, "group", self.group, rule)
        positive(self, "temperature", most=100)
        positive(self, "max_grad_norm", "clip")
        require(0 <= self.warm_up < 1, "warm_up", self.warm_up, "a number from 0 to less than 1")
        not_negative(self, "kl")
