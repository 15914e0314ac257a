"""How an arm is trained against repetition, and how it is read."""

from dataclasses import dataclass

from trimtab.errors import InputError
from trimtab.repetition.decoding import Decoder
from trimtab.validation import (
    MOST_WORKERS,
    at_least,
    listed,
    not_negative,
    of_field,
    one_of,
    positive,
    rates,
    require,
    seeds,
)


@dataclass(frozen=True)
class TrainingConfig:
    """One run. The defaults are those of the published code, but for the sizes."""

    updates: int = 100
    """Optimiser steps, of all kinds together."""
    prefixes: int = 6
    """Rollouts of a policy-gradient or sequence unlikelihood update."""
    prefix_tokens: int = 50
    """Of the text that a continuation goes on from."""
    tokens: int = 100
    """Of a continuation; nothing ends it earlier."""
    n: int = 4
    """Length of the n-grams that reward and unlikelihood are about."""
    rollout_temperature: float = 0.0
    """0: greedy, the published recipe. It pushes the very continuations that loop, but the gradient of a score function
    taken at the likeliest continuation is biased; 1 draws, and is not."""
    reward_weight: float = 3.0
    """Of the policy gradient."""
    unlikelihood_weight: float = 1.0
    """Of the unlikelihood loss, of sequences and of tokens (Welleck et al. 2020, alpha)."""
    max_grad_norm: float = 10.0
    """Policy gradients are scaled down to this norm; other updates are not, as published."""
    weight_decay: float = 0.01
    """AdamW's, on weight matrices."""
    readings: int = 4
    """Validations along a run, evenly spaced, the last at its end; the parameters of the best one are kept."""
    rows: int = 6
    """Sequences in one backward pass. They are short: on two cores six at once take half as long as one by one."""

    def __post_init__(self) -> None:
        at_least(1, self, "updates", "prefixes", "prefix_tokens", "tokens", "n", "readings", "rows")
        require(self.readings <= self.updates, "readings", self.readings, f"at most `updates` = {self.updates}")
        require(self.n <= self.tokens, "n", self.n, f"at most `tokens` = {self.tokens}, the length of a continuation")
        require(
            self.rollout_temperature in (0.0, 1.0), "rollout_temperature", self.rollout_temperature,
            "0 (greedy) or 1 (drawn from the model as it is, to which the gradient belongs)",
        )  # fmt: skip
        not_negative(self, "reward_weight", "unlikelihood_weight", "weight_decay")
        positive(self, "max_grad_norm")


@dataclass(frozen=True)
class RepetitionConfig(TrainingConfig):
    """Section `repetition`: what every arm shares."""

    learning_rates: tuple[float, ...] = (3e-5,)
    """Grid of AdamW's learning rate for arms that train weights of the model, tried with the first seed ..."""
    adapter_rate_factor: float = 100.0
    """... and for steering vectors and LoRA the same grid times this."""
    seeds: tuple[int, ...] = (0,)
    """One full run each: a seed sets prefixes, blocks and where each kind of update begins."""
    domains: tuple[str, ...] = ("wikipedia", "sotu")
    """Kinds of source that are read; the first is trained on, validated on, and decides."""
    val_prefixes: int = 32
    """Greedy continuations by which a learning rate is chosen."""
    val_tokens: int = 8_000
    """Of the text whose perplexity chooses the checkpoint."""
    test_prefixes: int = 64
    """Held-out texts that are continued greedily, which most claims are about; ..."""
    decoder_prefixes: int = 64
    """... so many of them, the first, by each further decoder; ..."""
    other_prefixes: int = 32
    """... and so many of each other domain, greedily alone."""
    test_tokens: int = 16_000
    """Of held-out text whose perplexity is read ..."""
    other_tokens: int = 16_000
    """... and the same of each other domain; 0: none."""
    row_tokens: int = 1024
    """Tokens of one such row, at most; no row crosses a document."""
    decoders: tuple[str, ...] = ("greedy", "top-k-3", "top-k-8", "nucleus-0.3", "nucleus-0.9")
    """How held-out prefixes are continued."""
    once_decoders: tuple[str, ...] = ("beam-4",)
    """Further ones, for the first seed alone ..."""
    base_decoders: tuple[str, ...] = ("penalty-1.2", "no-repeat-4", "dry", "contrastive-4-0.6")
    """... and for the untrained model alone: what one can do at decoding time."""
    sentences: int = 16
    """Held-out sentences whose probability is read as they are repeated ..."""
    repeats: int = 8
    """... so many times."""
    batch: int = 64
    """Continuations decoded at a time, of whatever decoders."""
    workers: int = 1
    """Runs at once, each a process with its share of the threads: decoding a few rows leaves most of a second thread
    idle. More of them need as many whole models' memory."""
    dtype: str = "bfloat16"
    """What the model computes in; trained parameters are fp32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = "val_prefixes val_tokens test_prefixes decoder_prefixes test_tokens row_tokens batch repeats"
        at_least(1, self, *counts.split())
        at_least(1, self, "workers", most=MOST_WORKERS)
        at_least(2, self, "row_tokens")
        require(
            self.decoder_prefixes <= self.test_prefixes, "decoder_prefixes", self.decoder_prefixes,
            f"at most `test_prefixes` = {self.test_prefixes}",
        )  # fmt: skip
        at_least(0, self, "other_prefixes", "other_tokens", "sentences")
        rates(self, "learning_rates")
        positive(self, "adapter_rate_factor")
        seeds(self, "seeds")
        listed(self, "domains", "decoders")
        require("greedy" in self.decoders, "decoders", self.decoders, "a list that holds greedy, for the claims")
        for name in ("decoders", "once_decoders", "base_decoders"):
            for decoder in getattr(self, name):
                try:
                    Decoder.of(decoder)
                except InputError as error:
                    raise of_field(name, error) from None
        every = [*self.decoders, *self.once_decoders, *self.base_decoders]
        twice = [decoder for decoder in every if every.count(decoder) > 1]
        rule = "decoders of which none is among `once_decoders`, `base_decoders` or `decoders` twice"
        require(not twice, "decoders", twice, rule)
        one_of(("bfloat16", "float32"), self, "dtype")


@dataclass(frozen=True)
class CompareConfig:
    """Section `repetition_compare`."""

    quality_decoders: tuple[str, ...] = ("nucleus-0.9",)
    """Whose continuations are scored for quality, with every seed ..."""
    once_quality_decoders: tuple[str, ...] = ("greedy",)
    """... and with the first seed alone: these no claim is about."""
    clusters: int = 12
    """Of the MAUVE-like divergence, about a tenth of the texts on one side."""
    shown: int = 4
    """Prefixes whose continuations are shown side by side."""

    def __post_init__(self) -> None:
        listed(self, "quality_decoders")
        once = self.once_quality_decoders
        require(len(set(once)) == len(once), "once_quality_decoders", once, "a list that holds each decoder once")
        rule = "a list that holds nucleus-0.9, which claims are about"
        require("nucleus-0.9" in self.quality_decoders, "quality_decoders", self.quality_decoders, rule)
        at_least(2, self, "clusters")
        at_least(1, self, "shown")
