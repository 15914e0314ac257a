"""One contender of `benchmarks/repetition.py` in a process of its own, measured on command as `updates.py` says.

    python benchmarks/contenders/against_repetition.py CONTENDER JOB PREFIXES

Contenders of this project's environment: Trimtab's updates as the pipeline takes them, and the published algorithm
(Lagutin et al. 2021; Welleck et al. 2020) in the shape of its code, written anew: rollouts decoded with gradients on,
n-grams found one by one in Python. A contender is made of (job, batches of prefixes, a list that holds the bare model,
which it may empty) and has `fit(clock)`, which takes one update after another and tells the clock where each begins.
"""

import importlib
import json
import sys
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import ClassVar

import nnsight  # noqa: F401  (the library imports it late: before memory is counted, as every other's)
import torch
from job import Clock
from meter import MIB, answers
from torch import Tensor
from transformers import PreTrainedModel
from updates import measure

from trimtab.pretrained import load_model
from trimtab.repetition.arms import Arm, Kind
from trimtab.repetition.config import TrainingConfig
from trimtab.repetition.training import Step

N = 4
REWARD_WEIGHT, MAX_GRAD_NORM, DECAY = 3.0, 10.0, 0.01
"""As published, and TrainingConfig's defaults."""
Batches = list[list[list[int]]]


@dataclass(frozen=True)
class Job:
    """Updates of one model, every weight of it trained by AdamW."""

    model: str
    """Folder."""
    rate: float
    prefixes: int
    """Rollouts of an update."""
    prefix_tokens: int
    tokens: int
    """Of a rollout; nothing ends it earlier."""
    rows: int
    """Sequences in one backward pass of ours."""
    device: str = "cpu"


class Ours:
    """`training.Step.on_rollouts` on a `FullPolicy`: bf16, with fp32 master weights."""

    kind: ClassVar[Kind]

    def __init__(self, job: Job, batches: Batches, bare: list[PreTrainedModel]) -> None:
        bare.clear()  # the arm loads its own
        self.batches = batches
        self.config = TrainingConfig(
            prefixes=job.prefixes, prefix_tokens=job.prefix_tokens, tokens=job.tokens, rows=job.rows, n=N,
            reward_weight=REWARD_WEIGHT, max_grad_norm=MAX_GRAD_NORM, weight_decay=DECAY,
        )  # fmt: skip
        self.policy = Arm("implicit").policy(job.model, dtype="bfloat16", device=job.device)
        masters = [weight.requires_grad_() for weight in self.policy.trained.values()]
        self.optimiser = torch.optim.AdamW(masters, lr=job.rate, weight_decay=DECAY, fused=True)

    def fit(self, clock: Clock) -> None:
        for number, batch in enumerate(cycle(self.batches), start=1):
            clock.begin()
            step = Step(self.policy, self.optimiser, self.config, seed=0, number=number)
            update = step.on_rollouts(torch.tensor(batch), self.kind, shuffled=False)
            clock.rolled = clock.began + update.rollout_s
            clock.judged([self.config.tokens], [update.reward])


class Policy(Ours):
    kind = "policy"


class Unlikelihood(Ours):
    kind = "unlikelihood"


class Both(Ours):
    kind = "both"


class Published:
    """The model in fp32, as published (apex O0)."""

    dtype = "float32"

    def __init__(self, job: Job, batches: Batches, bare: list[PreTrainedModel]) -> None:
        bare.clear()
        self.job, self.batches = job, batches
        self.model = load_model(job.model, dtype=self.dtype, device=job.device)
        self.weights = list(self.model.parameters())
        self.masters = self.weights
        if self.dtype != "float32":
            self.masters = [weight.detach().float().requires_grad_() for weight in self.weights]
        self.optimiser = torch.optim.AdamW(self.masters, lr=job.rate, weight_decay=DECAY)

    def fit(self, clock: Clock) -> None:
        for batch in cycle(self.batches):
            clock.begin()
            self.update(torch.tensor(batch, device=self.job.device), clock)

    def update(self, prefixes: Tensor, clock: Clock) -> None:
        raise NotImplementedError

    def decode(self, prefixes: Tensor, *, keep: bool) -> tuple[Tensor, Tensor | None]:
        """Greedy continuations [batch, tokens] and, if they are kept, logits of each step [batch, tokens, vocab].
        Gradients are on: the cache holds on to the graph of all steps."""
        given, cache, chosen, kept = prefixes, None, [], []
        for _ in range(self.job.tokens):
            out = self.model(given, past_key_values=cache, use_cache=True)
            cache, scores = out.past_key_values, out.logits[:, -1]
            given = scores.argmax(dim=1, keepdim=True)
            chosen.append(given)
            if keep:
                kept.append(scores)
        return torch.cat(chosen, dim=1), torch.stack(kept, dim=1) if keep else None

    def step(self, loss: Tensor, most: float | None) -> None:
        """Backward, and AdamW on fp32 weights."""
        loss.backward()
        if self.masters is not self.weights:
            for master, weight in zip(self.masters, self.weights, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        if most is not None:
            torch.nn.utils.clip_grad_norm_(self.masters, most)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.masters is not self.weights:
            with torch.no_grad():
                for master, weight in zip(self.masters, self.weights, strict=True):
                    weight.copy_(master)


class PublishedPolicy(Published):
    """REINFORCE with the batch's mean as baseline, from one teacher-forced pass."""

    def update(self, prefixes: Tensor, clock: Clock) -> None:
        continuations, _ = self.decode(prefixes, keep=False)
        clock.rolled_out()
        rewards = distinct_share(continuations)
        clock.judged([self.job.tokens], rewards.tolist())
        ids = torch.cat([prefixes, continuations], dim=1)
        logits = self.model(ids).logits[:, prefixes.shape[1] - 1 : -1]
        log_probs = target_log_probs(logits, continuations).sum(dim=1)
        advantages = (rewards - rewards.mean()).to(log_probs.device)
        self.step(-REWARD_WEIGHT * (log_probs * advantages).sum() / continuations.numel(), MAX_GRAD_NORM)


class PublishedUnlikelihood(Published):
    """Sequence unlikelihood of the logits that the rollouts were decoded by: backwards through a hundred steps."""

    def update(self, prefixes: Tensor, clock: Clock) -> None:
        continuations, logits = self.decode(prefixes, keep=True)
        clock.rolled_out()
        clock.judged([self.job.tokens], distinct_share(continuations).tolist())
        mask = repeated(continuations).to(logits.device)
        others = (1 - target_log_probs(logits, continuations).exp()).clamp(min=1e-20)
        self.step(-(others.log() * mask).sum() / continuations.numel(), None)


class PublishedPolicyBF16(PublishedPolicy):
    dtype = "bfloat16"


class PublishedUnlikelihoodBF16(PublishedUnlikelihood):
    dtype = "bfloat16"


def target_log_probs(logits: Tensor, target: Tensor) -> Tensor:
    """log softmax(logits) at the targets, in fp32: [batch, tokens]."""
    return logits.float().log_softmax(dim=2).gather(2, target[:, :, None])[:, :, 0]


def distinct_share(continuations: Tensor) -> Tensor:
    """1 - seq-rep-n of each."""
    shares = []
    for row in continuations.tolist():
        grams = [tuple(row[i : i + N]) for i in range(len(row) - N + 1)]
        shares.append(len(set(grams)) / len(grams))
    return torch.tensor(shares)


def repeated(continuations: Tensor) -> Tensor:
    """Tokens of n-grams that stood earlier, [batch, tokens]; as published, the last n-gram is never looked at."""
    mask = torch.zeros(continuations.shape)
    for i, row in enumerate(continuations.tolist()):
        seen = set()
        for j in range(len(row) - N):
            gram = tuple(row[j : j + N])
            if gram in seen:
                mask[i, j : j + N] = 1
            seen.add(gram)
    return mask


def main(name: str, job: Job, batches: Batches) -> None:
    with answers() as answer:
        module, _, which = name.partition(".")
        make = getattr(importlib.import_module(module), which)
        bare = [load_model(job.model, "bfloat16", job.device)]
        with torch.no_grad():  # once, so that what a library loads late is there before memory is counted
            bare[0](torch.tensor([[1, 2]], device=job.device))
        size = bare[0].get_memory_footprint() / MIB
        measure(lambda: make(job, batches, bare), size, job, answer)


if __name__ == "__main__":
    name, given, prefixes = sys.argv[1:]
    main(name, Job(**json.loads(given)), json.loads(Path(prefixes).read_text(encoding="utf-8")))
