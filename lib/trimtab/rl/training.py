"""The training loop: rollouts, rewards, advantages, one policy-gradient step; deterministic, resumable to the bit."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from trimtab import code
from trimtab.checkpoint import Checkpoint, resume_training, training_tensors
from trimtab.epochs import batch_of, mix
from trimtab.errors import InputError
from trimtab.identity import machine
from trimtab.rl.advantages import ESTIMATORS, informative
from trimtab.rl.config import RLConfig
from trimtab.rl.gradient import Terms, accumulate, check_packing, pack, surrogate, token_log_probs
from trimtab.rl.policy import Policy
from trimtab.rl.rollouts import Rollouts, rollout

SAVE_EVERY = 60.0
"""Seconds between checkpoints."""
BASELINE_DECAY = 0.9
"""Of the running mean that `reinforce_with_baseline` subtracts."""

RewardFunction = Callable[[Sequence[int], Rollouts], Float[Tensor, "prompts group"] | Sequence[Sequence[float]]]
"""Rewards of a batch of rollouts, one that is no finite number where a completion could not be judged; the first
argument says which of the prompts they are of."""


@dataclass(frozen=True)
class Update:
    """What was seen in one update."""

    update: int
    reward: float
    """Mean over completions that were judged."""
    informative: float
    """Share of groups whose rewards differ."""
    tokens: int
    """Generated tokens."""
    length: float
    """Mean tokens of a completion."""
    finished: float
    """Share of completions that ended by themselves."""
    entropy: float
    """Mean over generated tokens, nats."""
    gradient: float
    """Norm of the gradient before clipping."""
    norm: float
    """How far the trained parameters are from where they began."""
    rollout_s: float
    update_s: float
    unjudged: int = 0
    """Completions whose rewards were no finite numbers: they are left out."""


def train(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    reward: RewardFunction,
    config: RLConfig,
    *,
    learning_rate: float,
    seed: int,
    end: Sequence[int],
    checkpoint: Path | None = None,
    identity: Any = None,
    title: str = "policy",
    until: int | None = None,
    worth: Callable[[Sequence[Update]], bool] | None = None,
) -> list[Update]:
    """Train a policy's parameters in place on `prompts` (token ids). Returns the history, an entry for each update.

    `seed` sets which prompts come when, and the samples drawn. Prompts come without replacement, epoch after epoch.
    Interrupted, or stopped after the update number `until`, and called again with the same checkpoint file, arguments
    and machine and an equal fresh policy, it continues and ends with the same parameters; `identity` says what the
    rewards depend on (the task's answers, the arm), which no argument shows. `worth` is asked after each update whether
    the run should continue: if not, it ends there, and its checkpoint, which takes seconds for a whole model, is not
    written. At the end `policy.training_bytes` has the bytes of trained parameters, gradients and optimiser state.
    """
    check_packing(policy)
    parameters = list(policy.trained.values())
    for parameter in parameters:
        parameter.requires_grad_()
    start = [parameter.detach().clone() for parameter in parameters]
    optimiser = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    saved = Checkpoint(
        checkpoint, identity, config={name: getattr(config, name) for name in RLConfig.__dataclass_fields__},
        learning_rate=learning_rate, seed=seed, prompts=prompts, end=end, start=policy.trained, policy=type(policy),
        model=list(dict.fromkeys([policy.view._module, policy.base._module])), reward=code.of(reward), code=train,
        **machine(policy.device),
    )  # fmt: skip
    history: list[Update] = []
    baseline = 0.0
    if (found := saved.load()) is not None:
        tensors, record = found
        resume_training(tensors, policy.trained, optimiser)
        policy.publish()
        history, baseline = [Update(**entry) for entry in record["history"]], record["baseline"]
    last = config.updates if until is None else min(until, config.updates)
    bar = tqdm(total=last, initial=len(history), desc=title, unit="update", mininterval=1)
    last_save = time.monotonic()
    for number in range(len(history) + 1, last + 1):
        began = time.perf_counter()
        chosen = batch_of(number, config.prompts, len(prompts), seed)
        generator = torch.Generator().manual_seed(mix(seed, number))
        drawn = rollout(
            policy, [prompts[i] for i in chosen], group=config.group, max_new_tokens=config.max_new_tokens,
            temperature=config.temperature, end=end, generator=generator,
        )  # fmt: skip
        between = time.perf_counter()
        rewards = as_rewards(reward(chosen, drawn), drawn)
        advantages = ESTIMATORS[config.estimator](rewards, baseline)
        judged = rewards.isfinite()
        mean = rewards[judged].mean().item() if bool(judged.any()) else baseline
        baseline = mean if number == 1 else BASELINE_DECAY * baseline + (1 - BASELINE_DECAY) * mean
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min(1.0, number / max(1.0, config.warm_up * config.updates))
        norm = optimise(policy, optimiser, drawn, advantages, config)
        moved = sum((p.detach() - s).square().sum().item() for p, s in zip(parameters, start, strict=True))
        lengths = drawn.mask.sum(dim=2).float()
        history.append(
            Update(
                number, mean, informative(rewards).item(), drawn.tokens, lengths.mean().item(),
                drawn.finished.float().mean().item(), (drawn.entropy.sum() / drawn.tokens).item(), norm,
                math.sqrt(moved), between - began, time.perf_counter() - between, int((~judged).sum()),
            )
        )  # fmt: skip
        bar.set_postfix(reward=f"{mean:.2f}", refresh=False)
        bar.update()
        if worth is not None and not worth(history):
            break
        if checkpoint is not None and (number == last or time.monotonic() - last_save > SAVE_EVERY):
            record = {"history": [asdict(update) for update in history], "baseline": baseline}
            saved.save(training_tensors(policy.trained, optimiser), record)
            last_save = time.monotonic()
    bar.close()
    slots = [slot for each in optimiser.state.values() for slot in each.values() if isinstance(slot, Tensor)]
    policy.training_bytes = {
        "trained": sum(p.nbytes for p in parameters),
        "gradients": sum(p.nbytes if p.grad is None else p.grad.nbytes for p in parameters),
        "optimiser": sum(slot.nbytes for slot in slots),
    }
    return history


def as_rewards(given: Any, drawn: Rollouts) -> Float[Tensor, "prompts group"]:
    """What a reward function returned - a tensor, an array or lists, of numbers of any kind - in fp32 on the CPU.
    Raises InputError where it is no number for each completion."""
    shape = tuple(drawn.finished.shape)
    try:
        rewards = torch.as_tensor(given).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        rewards = torch.empty(0)
    if tuple(rewards.shape) != shape or rewards.is_complex():
        found = f"shape {list(rewards.shape)}" if isinstance(given, Tensor) else f"{given!r:.80}"
        raise InputError(f"A reward function must return a number for each of {list(shape)} completions, not {found}.")
    return rewards.float()


def optimise(
    policy: Policy,
    optimiser: torch.optim.Optimizer,
    drawn: Rollouts,
    advantages: Float[Tensor, "prompts group"],
    config: RLConfig,
) -> float:
    """The optimiser steps on one batch of rollouts. Returns the gradient's norm before clipping, of the last of them.

    The loss is the sum over generated tokens divided by *all* generated tokens of the batch. A group whose advantages
    are all zero has a gradient of zero (but for the KL penalty): it is left out of the backward pass, and stays in
    the divisor. Where all are left out no step is taken: Adam's momentum would move what nothing was learnt about.
    """
    needed = [p for p in range(len(advantages)) if config.kl > 0 or bool((advantages[p] != 0).any())]
    if not needed:
        return 0.0
    packs = [pack(drawn, needed[i : i + config.rows]) for i in range(0, len(needed), config.rows)]
    several = config.steps_per_batch > 1
    # The policy's own probabilities in the teacher-forced pass, not those of the rollout, which differ by rounding.
    old = [token_log_probs(policy, each, config.temperature) if several else None for each in packs]
    reference = [
        token_log_probs(policy, each, config.temperature, reference=True) if config.kl > 0 else None for each in packs
    ]
    norm = 0.0
    for _ in range(config.steps_per_batch):
        optimiser.zero_grad(set_to_none=False)
        for each, old_here, reference_here in zip(packs, old, reference, strict=True):
            weights = advantages[each.source[:, 0], each.source[:, 1]].to(policy.device)

            def loss(log_probs: Tensor, chunk: slice) -> Tensor:
                terms = Terms(
                    log_probs, weights[chunk],  # noqa: B023 (called at once)
                    None if old_here is None else old_here[chunk],  # noqa: B023
                    None if reference_here is None else reference_here[chunk],  # noqa: B023
                )  # fmt: skip
                return surrogate(terms, config.clip, config.kl).sum() / drawn.tokens

            accumulate(policy, each, config.temperature, loss)
        policy.collect_gradients()
        for parameter in policy.trained.values():  # as if the groups left out had been there
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norm = float(torch.nn.utils.clip_grad_norm_(policy.trained.values(), config.max_grad_norm))
        optimiser.step()
        policy.publish()
    return norm
