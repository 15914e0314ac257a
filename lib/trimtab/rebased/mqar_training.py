"""Training on multi-query associative recall, and the grid of runs that compares mixers."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.checkpoint import Checkpoint, resume_training, training_tensors
from trimtab.errors import InputError
from trimtab.identity import machine
from trimtab.launch import CHECKPOINT
from trimtab.rebased.mixers import ARMS
from trimtab.rebased.model import LanguageModel, ModelConfig
from trimtab.rebased.mqar import IGNORED, Recall, check_fits, recall
from trimtab.validation import (
    MOST_WORKERS,
    WIDEST,
    at_least,
    listed,
    nearest_of,
    not_negative,
    of_field,
    rates,
    require,
    seeds,
)

SAVE_EVERY = 60.0
"""Seconds between checkpoints."""
TEST_SEED = 1_000_003
"""Of the held-out rows, which are the same for every run."""
VARIED = ("rebased", "based")
"""Arms that are run at every width."""


@dataclass(frozen=True)
class MQARConfig:
    """Section `mqar`."""

    arms: tuple[str, ...] = ("rebased", "based", "softmax")
    """Mixers of the second block; the first is a convolution. `conv` alone is the floor."""
    tasks: Sequence[Sequence[int]] = ((64, 16),)
    """Tokens of a row, and pairs of key and value in it."""
    d_models: tuple[int, ...] = (64,)
    widths: tuple[int, ...] = (4, 8)
    """d_k of polynomial attention: the fewer features, the less state for each pair. Ablations take the least alone."""
    vocabulary: int = 512
    heads: int = 1
    """Of polynomial attention; softmax has one."""
    steps: int = 1000
    batch: int = 64
    """Rows of a step: always new ones."""
    learning_rates: tuple[float, ...] = (3e-3, 1e-2)
    """The same for every arm; AdamW, falling to 0 along a cosine after a tenth of the steps."""
    weight_decay: float = 0.1
    seeds: tuple[int, ...] = (0, 1, 2)
    valid_rows: int = 256
    """By which the rate is chosen."""
    test_rows: int = 1000
    """By which it is reported."""
    readings: int = 8
    """Validations along a run."""
    workers: int = 1
    """Runs at one time, each in a process of its own."""

    def __post_init__(self) -> None:
        listed(self, "arms", "tasks", "d_models", "widths")
        for arm in self.arms:
            known = arm in ("softmax", "conv", *ARMS)
            rule = f"a list of {', '.join(('softmax', 'conv', *ARMS))}{nearest_of(arm, ('softmax', 'conv', *ARMS))}"
            require(known, "arms", self.arms, rule)
        at_least(1, self, "vocabulary", "heads", "steps", "batch", "valid_rows", "test_rows", "readings")
        for task in self.tasks:
            good = len(task) == 2 and all(isinstance(each, int) for each in task)
            require(good, "tasks", list(self.tasks), "a list of pairs [tokens of a row, pairs]")
            try:
                check_fits(task[0], task[1], self.vocabulary)
            except InputError as error:
                raise of_field("tasks", error) from None
        for name in ("d_models", "widths"):
            require(max(getattr(self, name)) <= WIDEST, name, getattr(self, name), f"a list of numbers up to {WIDEST}")
        rule = f"at most the least of `d_models`, which is {min(self.d_models)}"
        require(self.heads <= min(self.d_models), "heads", self.heads, rule)
        at_least(1, self, "workers", most=MOST_WORKERS)
        rates(self, "learning_rates")
        not_negative(self, "weight_decay")
        seeds(self, "seeds")

    def model(self, job: "Job") -> ModelConfig:
        """Convolution, then the arm's mixer; learnt positions, no MLP, as in the papers."""
        mixers, heads = ("conv", job.arm), 1 if job.arm in ("softmax", "conv") else self.heads
        return ModelConfig(
            self.vocabulary, job.d_model, mixers, heads, job.width, job.d_model // heads, positions=job.time
        )

    def pairs_at(self, step: int, pairs: int) -> int:
        """Pairs of a step's rows: 4, 8, ... in equal shares of the first half, then all. Rows of many pairs alone leave
        a model on the plateau of guessing for most of a run."""
        stages = [n for n in (4, 8, 16, 32, 64, 128, 256) if n < pairs] + [pairs]
        return stages[min(len(stages) - 1, 2 * len(stages) * step // (self.steps + 1))]


class Job(NamedTuple):
    """One run of the grid: a cell (all but rate and seed), a learning rate and a seed."""

    arm: str
    time: int
    pairs: int
    d_model: int
    width: int
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class RecallRun:
    """What one run came to."""

    job: Job
    history: list[dict[str, int | float]]
    """`step`, `loss` (of training) and `accuracy` (on the validation rows) at each reading."""
    accuracy: float
    """On the test rows: share of queries whose likeliest token is the key's value."""
    state: int
    """Numbers that polynomial attention carries from token to token; 0 for softmax, which carries all, and for
    convolutions."""


def train_recall(
    config: MQARConfig, job: Job, device: str = "cpu", checkpoint: Path | None = None
) -> tuple[LanguageModel, RecallRun]:
    """One run. Interrupted and called again with the same checkpoint file, arguments and machine it continues, to the
    same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        model = LanguageModel(config.model(job)).to(device)
    optimiser = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=job.learning_rate, fused=True)
    names = ("steps", "batch", "weight_decay", "valid_rows", "readings")
    saved = Checkpoint(
        checkpoint, job._asdict(), model=config.model(job), config={name: getattr(config, name) for name in names},
        code=train_recall, **machine(device),
    )  # fmt: skip
    history, first = [], 0
    if (found := saved.load()) is not None:
        resume_training(found[0], model.state_dict(), optimiser)
        history, first = found[1]["history"], found[1]["step"]
    valid = recall(config.valid_rows, job.time, job.pairs, config.vocabulary, rows_of(TEST_SEED, 0, 1))
    every = max(1, config.steps // config.readings)
    last_save = time.monotonic()
    for step in range(first, config.steps):
        pairs = config.pairs_at(step, job.pairs)
        rows = recall(config.batch, job.time, pairs, config.vocabulary, rows_of(job.seed, step))
        for group in optimiser.param_groups:
            group["lr"] = job.learning_rate * shape(step, config.steps)
        loss = recall_loss(model, rows)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % every == 0 or step + 1 == config.steps:
            accuracy = float(recalled(model, valid).float().mean())
            history.append({"step": step + 1, "loss": loss.item(), "accuracy": accuracy})
        if checkpoint is not None and (time.monotonic() - last_save > SAVE_EVERY or step + 1 == config.steps):
            saved.save(training_tensors(model.state_dict(), optimiser), {"history": history, "step": step + 1})
            last_save = time.monotonic()
    test = recall(config.test_rows, job.time, job.pairs, config.vocabulary, rows_of(TEST_SEED, 0, 0))
    accuracy = float(recalled(model, test).float().mean())
    return model, RecallRun(job, history, accuracy, model.state_size())


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms and the learnt maps' gamma and beta do not."""
    kinds: dict[bool, list[Tensor]] = {True: [], False: []}
    for parameter in model.parameters():
        kinds[parameter.dim() > 1].append(parameter)
    return [{"params": kinds[True], "weight_decay": weight_decay}, {"params": kinds[False], "weight_decay": 0.0}]


def recall_loss(model: LanguageModel, rows: Recall) -> Tensor:
    """Mean cross-entropy over queries, whose logits alone are formed."""
    at = rows.labels != IGNORED
    device = model.embedding.weight.device
    hidden = model.hidden(rows.inputs.to(device))[at.to(device)]
    return F.cross_entropy(model.unembed(hidden), rows.labels[at].to(device))


@torch.no_grad()
def recalled(model: LanguageModel, rows: Recall, batch: int = 256) -> Tensor:
    """Whether each query's likeliest token is its label: [queries], row after row."""
    device, found = model.embedding.weight.device, []
    for inputs, labels in zip(rows.inputs.split(batch), rows.labels.split(batch), strict=True):
        at = labels != IGNORED
        hidden = model.hidden(inputs.to(device))[at.to(device)]
        found.append(model.unembed(hidden).argmax(dim=-1).cpu() == labels[at])
    return torch.cat(found)


def shape(step: int, steps: int, warm_up: float = 0.1) -> float:
    """Of the learning rate: up along a line, then down to 0 along a cosine."""
    warm = max(1.0, warm_up * steps)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - warm) / max(1.0, steps - warm)))))


def run_job(config: MQARConfig, device: str, *job: Any, place: Path) -> dict[str, Any]:
    """`train_recall` for `launch.each` with `places`: the run as plain numbers."""
    run = asdict(train_recall(config, Job(*job), device, place / CHECKPOINT)[1])
    return Job(*job)._asdict() | {name: value for name, value in run.items() if name != "job"}


def jobs(config: MQARConfig) -> Sequence[Job]:
    """The whole grid, the same rates and seeds for every cell. Softmax and convolutions have no width to vary."""
    found = []
    for (time_, pairs), d_model, arm in product(config.tasks, config.d_models, config.arms):
        widths = config.widths if arm in VARIED else [min(config.widths)]
        found += [
            Job(arm, time_, pairs, d_model, *rest) for rest in product(widths, config.learning_rates, config.seeds)
        ]
    return found


def rows_of(*numbers: int) -> torch.Generator:
    """The source of rows for a seed and a step, another for each."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return torch.Generator().manual_seed(seed)
