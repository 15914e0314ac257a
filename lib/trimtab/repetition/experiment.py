"""One arm's experiment: its texts, sweep, training, and what is read of it. Notebooks call this."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import polars as pl
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trimtab import launch
from trimtab.checkpoint import save_tensors
from trimtab.errors import InputError
from trimtab.identity import Identity, digest, identify, machine
from trimtab.pretrained import load_tokenizer
from trimtab.repetition.arms import Arm, PlainPolicy
from trimtab.repetition.config import RepetitionConfig
from trimtab.repetition.decoding import Decoder, continuations, together
from trimtab.repetition.dry import breakers_of
from trimtab.repetition.losses import accumulate
from trimtab.repetition.ngrams import seq_rep
from trimtab.repetition.texts import Library, Passages
from trimtab.repetition.training import Trained, train
from trimtab.rl.adapters import frozen_model
from trimtab.rl.policy import Policy

UNTRAINED = "untrained"
"""The arm that is only read."""
CEILING = 0.01
"""A rate may raise validation perplexity by this share at most, as the claim about test perplexity has it."""
MOST_NATS = 709.0
"""Nats a token whose perplexity is a float."""
EVALUATION_SEED = 1_000
"""Of drawn continuations: the same for every arm and training seed."""


@dataclass(frozen=True)
class Bench:
    """Everything that one arm's runs share."""

    arm: Arm | None
    """None: the untrained model."""
    config: RepetitionConfig
    folder: str
    device: str
    tokenizer: PreTrainedTokenizerBase
    library: Library

    @classmethod
    def of(cls, arm: str, config: RepetitionConfig, folder: str, corpus: str, device: str) -> "Bench":
        """Raises InputError for an unknown arm or decoder, and a missing corpus."""
        for name in (*config.decoders, *config.once_decoders, *config.base_decoders):
            Decoder.of(name)
        chosen = None if arm == UNTRAINED else Arm(arm)
        return cls(chosen, config, folder, device, load_tokenizer(folder), Library(Path(corpus)))

    def __getstate__(self) -> dict[str, Any]:
        """For a process of its own: what it was made of, not what was read since."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def identity(self) -> Identity:
        """What every result of the bench depends on, but for threads and code."""
        config = {name: value for name, value in vars(self.config).items() if name != "workers"}
        contents = {"model": Path(self.folder), "corpus": self.library.blocks}
        return identify(arm=str(self.arm), config=config, **contents, device=machine(self.device)["device"])

    @property
    def domain(self) -> str:
        """The one trained on and decided by."""
        return self.config.domains[0]

    def decoders(self, seed: int) -> list[str]:
        """What held-out prefixes are continued by: with the first seed also by more, and the untrained model by others
        yet: what needs no training."""
        chosen = [*self.config.decoders, *(self.config.once_decoders if seed == self.config.seeds[0] else ())]
        return chosen if self.arm else [*chosen, *self.config.base_decoders]

    @cached_property
    def train_prefixes(self) -> Int[Tensor, "texts prefix"]:
        """Beginnings of training blocks."""
        return self.library.passages("train", self.domain, self.config.prefix_tokens, 1_000_000, 0).tokens

    @cached_property
    def train_blocks(self) -> Int[Tensor, "blocks seq"]:
        """Whole training blocks, for likelihood; in another order than the prefixes."""
        longest = int(self.library.blocks["length"].max())  # type: ignore[arg-type]
        return self.library.passages("train", self.domain, longest, 1_000_000, 1).tokens

    @cached_property
    def val_prefixes(self) -> Int[Tensor, "texts prefix"]:
        """By whose greedy continuations a rate is chosen."""
        chosen = self.library.passages("val", self.domain, self.config.prefix_tokens, self.config.val_prefixes, 0)
        return chosen.tokens

    def passages(self, domain: str) -> Passages:
        """Held-out prefixes, each with what a human wrote after it: `prefix_tokens` + `tokens` long."""
        length = self.config.prefix_tokens + self.config.tokens
        most = self.config.test_prefixes if domain == self.domain else self.config.other_prefixes
        return self.library.passages("test", domain, length, most, 0)

    def policy(self, seed: int = 0) -> Policy:
        """A fresh one."""
        if self.arm is None:
            return PlainPolicy(frozen_model(self.folder, dtype=self.config.dtype, device=self.device))
        return self.arm.policy(self.folder, dtype=self.config.dtype, device=self.device, seed=seed)

    def rates(self) -> list[float]:
        """The grid, for what the arm trains."""
        factor = 1.0 if self.arm and self.arm.full else self.config.adapter_rate_factor
        return [rate * factor for rate in self.config.learning_rates]

    @cached_property
    def val_rows(self) -> list[Int[Tensor, " seq"]]:
        """By whose perplexity a checkpoint is chosen."""
        rows = self.library.rows("val", self.domain, self.config.row_tokens, self.config.val_tokens, 0)
        return [row for row, _ in rows]

    def validate(self, policy: Policy) -> float:
        """Nats a token of validation text."""
        found = [row_nats(policy, row) for row in self.val_rows]
        return sum(float(nats.sum()) for nats in found) / sum(map(len, found))

    def val_repetition(self, policy: Policy) -> float:
        """seq-rep-n of greedy continuations of validation prefixes."""
        (continued,) = self.continued(policy, [("greedy", self.val_prefixes)])
        return seq_rep(continued, self.config.n).mean().item()

    def continued(
        self, policy: Policy, tasks: Sequence[tuple[str, Int[Tensor, "_ prefix"]]]
    ) -> list[Int[Tensor, "_ tokens"]]:
        """Continuations of full length, for each decoder and its prefixes; token by token all of them together."""
        decoders = [Decoder.of(name) for name, _ in tasks]
        shared: dict[str, Any] = {"seed": EVALUATION_SEED, "batch": self.config.batch}
        alone = [(decoder, prefixes) for decoder, (_, prefixes) in zip(decoders, tasks, strict=True) if decoder.alone]
        breakers = breakers_of(self.tokenizer) if any(decoder.kind == "dry" for decoder in decoders) else []
        joint = together(policy, alone, self.config.tokens, breakers=breakers, **shared) if alone else []
        at = iter(joint)
        return [
            next(at) if decoder.alone else continuations(policy, prefixes, self.config.tokens, decoder, **shared)
            for decoder, (_, prefixes) in zip(decoders, tasks, strict=True)
        ]

    def train(self, rate: float, seed: int, folder: Path) -> "Run":
        """One run, or what its checkpoint in the folder holds; of the untrained model one of no updates."""
        policy = self.policy(seed)
        if self.arm is None:
            return Run(policy, Trained([], []))
        trained = train(
            policy, self.arm, self.train_prefixes, self.train_blocks, self.validate, self.config, learning_rate=rate,
            seed=seed, checkpoint=self.checkpoint(rate, seed, folder), identity={"validation": self.val_rows},
            title=f"{self.arm} seed {seed} rate {rate:g}",
        )  # fmt: skip
        return Run(policy, trained)

    def checkpoint(self, rate: float, seed: int, folder: Path) -> Path:
        """The file of one run of this identity."""
        return folder / digest(self.identity) / f"seed-{seed}-rate-{rate:g}.safetensors"


@dataclass(frozen=True)
class Run:
    """A trained policy and its history."""

    policy: Policy
    trained: Trained


def row_nats(policy: Policy, row: Int[Tensor, " seq"]) -> Float[Tensor, " predictions"]:
    """-log p of every token of a row but the first."""
    return -accumulate(policy, row[None], 1, None)[1]


@dataclass(frozen=True)
class Sweep:
    """What each learning rate came to, with the first seed."""

    table: pl.DataFrame
    """Columns `learning_rate`, `kept` (updates after which validation perplexity was least), `val_perplexity`, and
    `val_seq_rep`, greedily; both of the kept parameters."""
    untrained: float
    """Validation perplexity of the model as it was."""

    @property
    def best(self) -> float:
        """Of the rates that keep validation perplexity within `CEILING` of the untrained model's the one that repeats
        least; where none does, the one with the least perplexity. Of equals the lower."""
        within = self.table.filter(pl.col("val_perplexity") <= (1 + CEILING) * self.untrained)
        ranked = within.sort("val_seq_rep", "learning_rate") if len(within) else self.table.sort("val_perplexity")
        return float(ranked["learning_rate"][0])


def sweep(bench: Bench, untrained: Policy, folder: Path) -> Sweep:
    """A whole run at each learning rate of the grid, with the first seed; of those not chosen no checkpoint is kept.
    `folder` has what an interrupted sweep goes on from."""
    rates, identity = bench.rates(), bench.identity
    read = partial(bench.validate, untrained)
    (nats,) = launch.each(read, [()], folder / "untrained", identity=identity, title="untrained")
    run, jobs = partial(try_rate, bench, folder), [(rate,) for rate in rates]
    workers, title = bench.config.workers, f"{bench.arm}, rates"
    rows = launch.each(run, jobs, folder / "sweep", identity=identity, workers=workers, title=title)
    table = pl.DataFrame(rows, schema_overrides={"kept": pl.Int32})
    if not table["val_perplexity"].is_finite().any():
        raise InputError(
            f"{bench.arm} falls apart at every learning rate: lower learning_rates or adapter_rate_factor of section "
            "repetition."
        )
    swept = Sweep(table, perplexity_of(nats))
    for rate in rates:
        if rate != swept.best:
            bench.checkpoint(rate, bench.config.seeds[0], folder).unlink(missing_ok=True)
    return swept


def try_rate(bench: Bench, folder: Path, rate: float) -> dict[str, float]:
    """A row of the sweep's table; see `Sweep`."""
    run = bench.train(rate, bench.config.seeds[0], folder)
    kept = run.trained.kept
    broken = math.isinf(kept.nats)  # a policy of NaN cannot be decoded
    repetition = 1.0 if broken else bench.val_repetition(run.policy)
    row = {"learning_rate": rate, "kept": kept.update}
    return row | {"val_perplexity": perplexity_of(kept.nats), "val_seq_rep": repetition}


def perplexity_of(nats: float) -> float:
    """exp(nats), infinite where no float is as large."""
    return math.exp(nats) if nats < MOST_NATS else math.inf


def history_of(seed: int, trained: Trained) -> pl.DataFrame:
    """Every update, without times: columns of `training.Update`, after `seed`."""
    rows = [{"seed": seed} | {k: v for k, v in vars(u).items() if not k.endswith("_s")} for u in trained.history]
    schema = {"seed": pl.Int32, "update": pl.Int32, "kind": pl.String}
    schema |= dict.fromkeys(("loss", "reward", "masked", "gradient"), pl.Float64)
    return pl.DataFrame(rows, schema=schema, orient="row").with_columns(pl.col("reward", "masked").fill_nan(None))


def validations_of(seed: int, trained: Trained) -> pl.DataFrame:
    """Columns `seed`, `update`, `perplexity`, and `kept`: whether its parameters are the run's."""
    rows = [(seed, each.update, perplexity_of(each.nats), each == trained.kept) for each in trained.readings]
    schema = {"seed": pl.Int32, "update": pl.Int32, "perplexity": pl.Float64, "kept": pl.Boolean}
    return pl.DataFrame(rows, schema=schema, orient="row")


def save_trained(folder: Path, bench: Bench, run: Run) -> None:
    """What was trained as `trained.safetensors`, but for whole models: half a gigabyte each, and nothing reads them."""
    if bench.arm and not bench.arm.full:
        save_tensors(folder / "trained.safetensors", run.policy.trained, {"arm": str(bench.arm)})
