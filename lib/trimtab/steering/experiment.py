"""One arm's experiment: its items and prompts, sweep, training and held-out reading. Notebooks call this."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trimtab.checkpoint import Checkpoint, fingerprint, save_tensors
from trimtab.identity import Identity, identify, machine
from trimtab.pretrained import end_tokens, load_tokenizer
from trimtab.rl.adapters import frozen_model
from trimtab.rl.config import RLConfig
from trimtab.rl.evaluation import GREEDY, answers, summary
from trimtab.rl.policy import Policy
from trimtab.rl.rollouts import Rollouts, rollout
from trimtab.rl.tasks import Item, Task, chat_prompt, digest, open_task
from trimtab.rl.training import RewardFunction, Update, train
from trimtab.rl.verify import exact
from trimtab.steering.arms import Arm, Built
from trimtab.steering.config import SteeringConfig
from trimtab.steering.export import save_vectors

if TYPE_CHECKING:
    from nnsight import TransformersModel

HOPELESS = 3
"""Updates without a single reward after which a short run is given up."""
EVALUATION_SEED = 1_000
"""Of the draws on held-out items: the same for every arm and training seed."""


@dataclass(frozen=True)
class Questions:
    """Items of one task with their prompts."""

    task: Task
    items: Sequence[Item]
    prompts: Sequence[list[int]]

    @classmethod
    def of(cls, name: str, split: str, n: int, tokenizer: PreTrainedTokenizerBase) -> "Questions":
        """The first n items of a split."""
        task = open_task(name)
        items = task.items(split, n, seed=0)
        return cls(task, items, [chat_prompt(tokenizer, item) for item in items])

    def spread(self, n: int) -> list[int]:
        """Numbers of n items, the same every time, over all wordings and many subjects."""
        return sorted(range(len(self.items)), key=lambda i: digest(self.items[i].question))[:n]

    def sample(self, n: int) -> "Questions":
        """Those n."""
        chosen = self.spread(n)
        return replace(self, items=[self.items[i] for i in chosen], prompts=[self.prompts[i] for i in chosen])

    def judge(self, i: int, completion: str) -> float:
        """1 where the completion, which must have come to its end, answers item i."""
        return self.task.reward(completion, self.items[i])


@dataclass(frozen=True)
class Run:
    """A trained policy and its history."""

    built: Built
    history: list[Update]

    @property
    def policy(self) -> Policy:
        """What was trained."""
        return self.built.policy


@dataclass(frozen=True)
class Bench:
    """Everything that one arm's runs share."""

    arm: Arm
    config: SteeringConfig
    folder: str
    device: str
    tokenizer: PreTrainedTokenizerBase
    questions: Questions
    """Training items."""
    held_out: Mapping[str, Questions]
    """By task, the one that decides first."""

    @classmethod
    def of(cls, arm: str, config: SteeringConfig, folder: str, device: str) -> "Bench":
        """Read the tokenizer and draw the items. Raises InputError for an unknown arm or task."""
        chosen, tokenizer = Arm(arm), load_tokenizer(folder)
        held_out = {config.reading: Questions.of(config.reading, "test", config.test_items, tokenizer)}
        for name in config.other_tasks if config.other_items else ():
            held_out[name] = Questions.of(name, "test", config.other_items, tokenizer)
        questions = Questions.of(config.task, "train", config.train_items, tokenizer)
        return cls(chosen, config, folder, device, tokenizer, questions, held_out)

    @cached_property
    def frozen(self) -> "TransformersModel":
        """The untrained model, which all runs of a steering arm share."""
        return frozen_model(self.folder, dtype=self.config.dtype, device=self.device)

    @cached_property
    def identity(self) -> Identity:
        """What rewards depend on: the arm, the items and their judge."""
        task = self.questions.task
        return identify(arm=str(self.arm), task=task, judge=type(task), items=self.questions.items)

    @property
    def end(self) -> list[int]:
        """Tokens that end a completion."""
        return end_tokens(self.folder, self.tokenizer)

    def build(self, seed: int = 0) -> Built:
        """A fresh policy of the arm."""
        return self.arm.policy(
            self.folder, dtype=self.config.dtype, device=self.device, seed=seed, reference=self.config.kl > 0,
            frozen=self.frozen if self.arm.steers else None,
        )  # fmt: skip

    def train(
        self,
        learning_rate: float,
        seed: int,
        checkpoint: Path | None = None,
        until: int | None = None,
        worth: Callable[[Sequence[Update]], bool] | None = None,
    ) -> Run:
        """One run, or its first updates; see `rl.training.train`."""
        built = self.build(seed)
        history = train(
            built.policy, self.questions.prompts, self.reward(seed), self.config, learning_rate=learning_rate,
            seed=seed, end=self.end, checkpoint=checkpoint, identity=self.identity,
            title=f"{self.arm} seed {seed} rate {learning_rate:g}", until=until, worth=worth,
        )  # fmt: skip
        return Run(built, history)

    def judged(self, questions: Questions, chosen: Sequence[int], drawn: Rollouts) -> Float[Tensor, "prompts group"]:
        """Which completions are right; `chosen`: numbers of the questions. One that was cut off never is: where it was
        cut would otherwise decide what its last number is, and a policy that never stops would do as well."""
        right = torch.zeros(drawn.finished.shape)
        for p, m in drawn.finished.nonzero().tolist():
            right[p, m] = questions.judge(chosen[p], self.decode(drawn.completion(p, m)))
        return right

    def reward(self, seed: int) -> RewardFunction:
        """The task's reward; for the control, a coin that falls as often as the batch's completions are right."""

        def right(chosen: Sequence[int], drawn: Rollouts) -> Float[Tensor, "prompts group"]:
            return self.judged(self.questions, chosen, drawn)

        def coin(chosen: Sequence[int], drawn: Rollouts) -> Float[Tensor, "prompts group"]:
            rewards = right(chosen, drawn)
            # From the batch itself, so that a resumed run tosses the same coins.
            generator = torch.Generator().manual_seed(int(fingerprint([seed, list(chosen)])[:15], 16))
            return rewards.flatten()[torch.randperm(rewards.numel(), generator=generator)].view(rewards.shape)

        return coin if self.arm.random_reward else right

    def decode(self, ids: list[int]) -> str:
        """Token ids to text, special tokens left in: a reply that holds one is not an answer."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def answers(self, policy: Policy, seed: int, tasks: Sequence[str] | None = None) -> pl.DataFrame:
        """Greedy completions of every held-out item, and drawn ones of some, judged. Columns: `rl.evaluation.ANSWERS`,
        `subject`, `task`, `seed`, and `exact`, whether the reply is the answer and nothing else. Other tasks are read
        greedily alone."""
        tables = []
        for name in tasks or self.held_out:
            held_out = self.held_out[name]
            table = answers(
                policy, held_out.prompts, held_out.judge, self.decode,
                samples=self.config.samples if name == self.config.reading else 0,
                max_new_tokens=self.config.read_tokens, temperature=self.config.read_temperature, end=self.end,
                seed=EVALUATION_SEED, sampled=held_out.spread(self.config.sampled_items),
            )  # fmt: skip
            exactly = [
                exact(text, held_out.items[i].answer) for i, text in table.select("item", "completion").iter_rows()
            ]
            subjects = [item.subject or item.question for item in held_out.items]
            kept = table.with_columns(
                pl.Series("subject", [subjects[i] for i in table["item"]]),
                pl.lit(name).alias("task"),
                pl.lit(seed, pl.Int32).alias("seed"),
                pl.Series("exact", exactly),
            )
            tables.append(kept)
        return pl.concat(tables)

    def sample(self, n: int) -> Questions:
        """A sample of n held-out questions of the task that decides."""
        return self.held_out[self.config.reading].sample(n)

    def right(self, policy: Policy, questions: Questions, prefix: Sequence[int] = (), batch: int = 128) -> list[float]:
        """Whether the greedy completion of each question is right. With a `prefix` the reply is made to begin with
        those tokens, which belong to the prompt (the "To" of Sinii et al. 2025b): what follows them is judged."""
        found = []
        for start in range(0, len(questions.prompts), batch):
            prompts = [[*prompt, *prefix] for prompt in questions.prompts[start : start + batch]]
            limits = {"max_new_tokens": self.config.read_tokens, "temperature": 0.0, "end": self.end}
            drawn = rollout(policy, prompts, group=1, **limits)  # type: ignore[arg-type]
            found += self.judged(questions, range(start, start + len(prompts)), drawn)[:, 0].tolist()
        return found


@dataclass(frozen=True)
class Sweep:
    """What each learning rate earned, with the first seed."""

    short: Mapping[float, float]
    """Mean reward over the last half of the first `sweep_updates` updates, by rate."""
    whole: Mapping[float, float]
    """The same over a run of full length, of the two best."""
    run: Run
    """The whole run of the best."""

    @property
    def best(self) -> float:
        """The rate that earned the most over a whole run."""
        return max(self.whole, key=lambda rate: self.whole[rate])

    @property
    def table(self) -> pl.DataFrame:
        """Columns `learning_rate`, `short`, `whole`."""
        rows = [(rate, reward, self.whole.get(rate)) for rate, reward in self.short.items()]
        return pl.DataFrame(rows, schema=dict.fromkeys(("learning_rate", "short", "whole"), pl.Float64), orient="row")


def sweep(bench: Bench, folder: Path) -> Sweep:
    """Begin a run at each learning rate of the grid, and finish the two that earn the most.

    Short runs alone would favour rates at which the policy rises fast and then falls apart. `folder` holds the
    checkpoints, of two rates at a time, from which an interrupted sweep of equal contents continues.
    """
    config, rates = bench.config, {f"{rate:g}": rate for rate in bench.config.learning_rates}
    names = (*RLConfig.__dataclass_fields__, "learning_rates", "sweep_updates", "dtype")
    log = Checkpoint(
        folder / "sweep.safetensors", bench.identity, config={name: getattr(config, name) for name in names},
        seed=config.seeds[0], prompts=bench.questions.prompts, end=bench.end, model=Path(bench.folder), code=sweep,
        **machine(bench.device),
    )  # fmt: skip
    place = folder / f"rates-{fingerprint(log.identity)[:16]}"
    short: dict[str, float] = (log.load() or ({}, {}))[1]

    def best() -> list[str]:
        return sorted(short, key=lambda name: short[name], reverse=True)[:2]

    def worth(history: Sequence[Update]) -> bool:
        if len(history) < config.sweep_updates:  # a policy that is never right learns nothing any more
            return len(history) < HOPELESS or any(update.reward for update in history[-HOPELESS:])
        return len(short) < 2 or late(history) > short[best()[1]]

    for name, rate in rates.items():
        if name not in short:
            run = bench.train(
                rate, config.seeds[0], place / f"{name}.safetensors", until=config.sweep_updates, worth=worth
            )
            short[name] = late(run.history)
            log.save({}, short)
        for other in set(short) - set(best()):  # optimiser states of a whole model are large
            (place / f"{other}.safetensors").unlink(missing_ok=True)
    runs = {rates[name]: bench.train(rates[name], config.seeds[0], place / f"{name}.safetensors") for name in best()}
    whole = {rate: late(run.history) for rate, run in runs.items()}
    earned = {rates[name]: reward for name, reward in short.items()}
    return Sweep(earned, whole, runs[max(whole, key=lambda rate: whole[rate])])


def late(history: Sequence[Update]) -> float:
    """Mean reward over the last half of a history."""
    last = [update.reward for update in history[len(history) // 2 :]]
    return sum(last) / len(last)


def accuracy_table(answered: pl.DataFrame) -> pl.DataFrame:
    """A row for each task and seed of `Bench.answers`: `rl.evaluation.summary`, and as `greedy_exact` the share of
    greedy replies that are the answer and nothing else."""
    rows = []
    for (task, seed), table in answered.group_by("task", "seed", maintain_order=True):
        exactly = table.filter(pl.col("sample") == GREEDY)["exact"].mean()
        rows.append({"task": task, "seed": seed, **summary(table), "greedy_exact": exactly})
    return pl.DataFrame(rows)


def save(folder: Path, bench: Bench, runs: Mapping[int, Run]) -> None:
    """What was trained, for each seed: vectors as `vectors.safetensors`, adapters as `adapter.safetensors`. A fully
    tuned model is not kept: half a gigabyte a seed, and nothing reads it."""
    for seed, run in runs.items():
        if run.built.vectors is not None:
            save_vectors(folder / f"seed-{seed}/vectors.safetensors", run.built.vectors, bench.folder)
        elif str(bench.arm) != "full":
            save_tensors(folder / f"seed-{seed}/adapter.safetensors", run.policy.trained)
