"""The training loop: one optimiser step an update, of the kind that the schedule says; resumable to the bit.

The published code keeps the graph through a hundred steps of cached decoding. Here rollouts carry no gradient; one
teacher-forced pass over prefix and continuation gives every log-probability that policy gradient and unlikelihood need,
which is the same gradient. Prefixes have one length, so that nothing is padded.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from trimtab import code
from trimtab.checkpoint import Checkpoint, resume_training, training_tensors
from trimtab.epochs import batch_of, mix
from trimtab.identity import machine
from trimtab.launch import in_worker
from trimtab.repetition.arms import VECTORS, Arm, Kind
from trimtab.repetition.config import TrainingConfig
from trimtab.repetition.decoding import Decoder, continuations
from trimtab.repetition.losses import accumulate, token_unlikelihood, weighted
from trimtab.repetition.ngrams import repeated, reward
from trimtab.rl.advantages import grpo_no_std
from trimtab.rl.policy import Policy

SAVE_EVERY = 300.0
"""Seconds between checkpoints: of a whole model one is two gigabytes."""


@dataclass(frozen=True)
class Update:
    """What was seen in one update; NaN where its kind has no such thing."""

    update: int
    kind: str
    loss: float
    """Of likelihood: nats a token. Of rollouts: what was descended."""
    reward: float
    """Mean over the rollouts: 1 - seq-rep-n."""
    masked: float
    """Share of the rollouts' tokens that belong to a repeated n-gram."""
    gradient: float
    """Norm before clipping. 0: rewards were all alike, or nothing was repeated, and no step was taken."""
    rollout_s: float
    update_s: float


@dataclass(frozen=True)
class Reading:
    """A validation."""

    update: int
    """Updates before it."""
    nats: float
    """Mean of a validation token; infinite where the run has fallen apart."""


@dataclass(frozen=True)
class Trained:
    """A run's history. The policy holds the parameters of the reading with the least validation perplexity."""

    history: list[Update]
    readings: list[Reading]

    @property
    def kept(self) -> Reading:
        """The reading whose parameters the policy has."""
        return min(self.readings, key=lambda reading: reading.nats)


def train(
    policy: Policy,
    arm: Arm,
    prefixes: Int[Tensor, "texts prefix"],
    blocks: Int[Tensor, "blocks seq"],
    validate: Callable[[Policy], float],
    config: TrainingConfig,
    *,
    learning_rate: float,
    seed: int,
    checkpoint: Path | None = None,
    identity: Any = None,
    title: str = "policy",
) -> Trained:
    """Train a policy's parameters in place.

    Rollouts go on from `prefixes`, likelihood is taken on `blocks`, one an update, both without replacement, epoch
    after epoch. The learning rate falls linearly to 0. `validate` gives nats a token. Interrupted and called again with
    the same checkpoint file, arguments and machine and an equal fresh policy, it continues and ends with the same
    parameters; `identity` says what `validate` depends on (its text), which no argument shows.
    """
    for parameter in policy.trained.values():
        parameter.requires_grad_()
    optimiser = torch.optim.AdamW(_groups(policy.trained, config.weight_decay), lr=learning_rate, eps=1e-8, fused=True)
    saved = Checkpoint(
        checkpoint, identity, config={name: getattr(config, name) for name in TrainingConfig.__dataclass_fields__},
        learning_rate=learning_rate, seed=seed, arm=str(arm), prefixes=prefixes, blocks=blocks, start=policy.trained,
        policy=type(policy), model=policy.view._module, validation=code.of(validate), code=train,
        **machine(policy.device),
    )  # fmt: skip
    history: list[Update] = []
    readings: list[Reading] = []
    best: dict[str, Tensor] = {}
    if (found := saved.load()) is not None:
        tensors, record = found
        best = {name.removeprefix("best."): t for name, t in tensors.items() if name.startswith("best.")}
        history = [Update(**entry) for entry in record["history"]]
        readings = [Reading(**entry) for entry in record["readings"]]
        if len(history) < config.updates:  # a finished run has kept its best parameters alone
            resume_training(tensors, policy.trained, optimiser)
            policy.publish()
    kinds = arm.mix.schedule(config.updates, seed)
    read_after = {round(config.updates * (i + 1) / config.readings) for i in range(config.readings)}
    bar = tqdm(
        total=config.updates, initial=len(history), desc=title, unit="update", mininterval=1, disable=in_worker()
    )
    last_save = time.monotonic()
    for number in range(len(history) + 1, config.updates + 1):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * (1 - (number - 1) / config.updates)
        kind = kinds[number - 1]
        step = Step(policy, optimiser, config, seed, number)
        if kind.startswith("likelihood"):
            (chosen,) = batch_of(number, 1, len(blocks), seed)
            seen = step.on_text(blocks[chosen], kind)
        else:
            some = batch_of(number, config.prefixes, len(prefixes), seed)
            seen = step.on_rollouts(prefixes[some], kind, shuffled=arm.shuffled)
        history.append(seen)
        bar.set_postfix(kind=kind, reward=f"{seen.reward:.2f}", refresh=False)
        bar.update()
        if number in read_after:
            nats = validate(policy)
            readings.append(Reading(number, nats if math.isfinite(nats) else math.inf))
            if not best or readings[-1].nats < min(reading.nats for reading in readings[:-1]):
                best = {name: parameter.detach().clone() for name, parameter in policy.trained.items()}
        last = number == config.updates
        if checkpoint is not None and (last or time.monotonic() - last_save > SAVE_EVERY):
            tensors = {} if last else training_tensors(policy.trained, optimiser)
            tensors |= {f"best.{name}": t for name, t in best.items()}
            record = {"history": [asdict(u) for u in history], "readings": [asdict(r) for r in readings]}
            saved.save(tensors, record)
            last_save = time.monotonic()
    bar.close()
    with torch.no_grad():
        for name, parameter in policy.trained.items():
            parameter.copy_(best[name])
    policy.publish()
    return Trained(history, readings)


def _groups(trained: Mapping[str, Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Decay on matrices, none on biases, norms and steering vectors."""
    matrices = [p for name, p in trained.items() if p.dim() > 1 and name != VECTORS]
    others = [p for name, p in trained.items() if p.dim() <= 1 or name == VECTORS]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@dataclass(frozen=True)
class Step:
    """One update of a policy."""

    policy: Policy
    optimiser: torch.optim.Optimizer
    config: TrainingConfig
    seed: int
    number: int
    """Of the update, from 1."""

    def on_text(self, block: Int[Tensor, " seq"], kind: Kind) -> Update:
        """Likelihood of a block, each token but the first; with `likelihood+tokens` token unlikelihood as well."""
        began = time.perf_counter()
        tokens, row = len(block) - 1, block[None]
        target = block[1:].to(self.policy.device)
        places = torch.arange(1, len(block), device=self.policy.device)
        one = torch.full((tokens,), 1 / tokens, device=self.policy.device)

        def loss(logits: Tensor, chunk: slice) -> Float[Tensor, ""]:
            nats = weighted(logits, target[chunk], one[chunk], torch.zeros_like(one[chunk]))
            if kind == "likelihood":
                return nats
            pushed = token_unlikelihood(logits, block, places[chunk]) / tokens
            return nats + self.config.unlikelihood_weight * pushed

        _, log_probs = accumulate(self.policy, row, 1, loss)
        norm = self._step(clip=False)
        nan = math.nan
        return Update(
            self.number, kind, -log_probs.mean().item(), nan, nan, norm, 0.0, time.perf_counter() - began
        )  # fmt: skip

    def on_rollouts(self, prefixes: Int[Tensor, "batch prefix"], kind: Kind, *, shuffled: bool) -> Update:
        """Policy gradient, sequence unlikelihood, or both from the same rollouts.

        The policy gradient is REINFORCE with the mean reward of the batch as its baseline (RLOO but for a factor):
        weights (R_i - mean R) / (batch x tokens), times `reward_weight`. Equal rewards, and rollouts without a repeated
        n-gram, have no gradient: then no step is taken, for Adam's momentum would move what nothing was learnt about.
        """
        config, began = self.config, time.perf_counter()
        written = self._rollouts(prefixes)
        between = time.perf_counter()
        rewards = reward(written, config.n)
        mask = repeated(written, config.n)
        if shuffled:
            generator = torch.Generator().manual_seed(mix(self.seed, -self.number))
            rewards = rewards[torch.randperm(len(rewards), generator=generator)]
        advantages = grpo_no_std(rewards[None])[0]  # the batch is the group
        likely, unlikely = torch.zeros(2, *written.shape)
        if kind in ("policy", "both"):
            likely += config.reward_weight * advantages[:, None] / written.numel()
        if kind in ("unlikelihood", "both"):
            unlikely += config.unlikelihood_weight * mask / written.numel()
        total, norm = 0.0, 0.0
        if bool(likely.any()) or bool(unlikely.any()):
            total = self._on_continuations(prefixes, written, likely, unlikely)
            norm = self._step(clip=kind != "unlikelihood")
        return Update(
            self.number, kind, total, rewards.mean().item(), mask.float().mean().item(), norm, between - began,
            time.perf_counter() - between,
        )  # fmt: skip

    def _rollouts(self, prefixes: Int[Tensor, "batch prefix"]) -> Int[Tensor, "batch tokens"]:
        decoder = Decoder.of("sampling" if self.config.rollout_temperature else "greedy")
        return continuations(
            self.policy, prefixes, self.config.tokens, decoder, seed=mix(self.seed, self.number), batch=len(prefixes),
            show=False,
        )  # fmt: skip

    def _on_continuations(
        self,
        prefixes: Int[Tensor, "batch prefix"],
        written: Int[Tensor, "batch tokens"],
        likely: Float[Tensor, "batch tokens"],
        unlikely: Float[Tensor, "batch tokens"],
    ) -> float:
        total = 0.0
        needed = ((likely != 0) | (unlikely != 0)).any(dim=1).nonzero()[:, 0].tolist()
        for some in (needed[i : i + self.config.rows] for i in range(0, len(needed), self.config.rows)):
            rows = torch.cat([prefixes[some], written[some]], dim=1)
            flat = [t[some].flatten().to(self.policy.device) for t in (written, likely, unlikely)]

            def loss(logits: Tensor, chunk: slice, flat: Sequence[Tensor] = flat) -> Float[Tensor, ""]:
                return weighted(logits, *(each[chunk] for each in flat))

            total += accumulate(self.policy, rows, prefixes.shape[1], loss)[0]
        return total

    def _step(self, *, clip: bool) -> float:
        """The optimiser's step; returns the gradient's norm before clipping."""
        self.policy.collect_gradients()
        most = self.config.max_grad_norm if clip else math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.policy.trained.values(), most))
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.policy.publish()
        return norm
