"""How well what a latent fires on hangs together, judged by a sentence encoder: the example-embedding score.

After Paulo and Belrose (arXiv 2507.08473; `example_embedding` of delphi): a window in which a latent fires should be
nearer to its other windows than to windows in which it is silent. No explanation and no judge is needed. Here each
window is in turn the query and the others are the examples, which uses every pair once and stays exactly at chance
where the windows have nothing to do with the latent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trimtab.activations import ActivationCache
from trimtab.embeddings import SentenceEncoder
from trimtab.pretrained import DTYPES
from trimtab.sae.contexts import Contexts, Example
from trimtab.sae.model import SAE
from trimtab.validation import ascending, at_least, one_of, require, seeds

HIGHLIGHT = 0.3
"""Tokens with at least this share of the window's largest activation are marked, as in delphi."""
NEGATIVES = 6
"""Silent windows for each one in which a latent fires. They come from the pool, so that more of them cost nothing."""

SCORES: dict[str, Any] = {"bucket": pl.String, "latent": pl.Int32} | dict.fromkeys(
    ("density", "median_rank", "marks", "auroc", "delta"), pl.Float64
)
COUNTS: dict[str, Any] = {"bucket": pl.String} | dict.fromkeys(
    ("firing", "rare", "never_silent", "scorable", "scored"), pl.Int32
)


@dataclass(frozen=True)
class InterpretConfig:
    """What is scored."""

    arms: tuple[str, ...] = ("topk-64", "hierarchical-64")
    """The two arms that are compared: TopK and HierarchicalTopK, both trained up to the last of the buckets."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds of the SAEs to score."""
    buckets: tuple[int, ...] = (8, 32, 64)
    """Last rank of each bucket, ascending; the last one is the number of latents read per token."""
    latents: int = 48
    """Latents to score of each subject and bucket, at least 2, drawn from all that can be scored."""
    examples: int = 16
    """Windows per latent, at least 2; a latent that fires in fewer of a bucket is counted, not scored."""
    pool: int = 1500
    """Windows of each cache from which silent ones are taken."""
    window: int = 32
    """Tokens in a window."""
    encoder_dtype: str = "bfloat16"
    """Precision of the sentence encoder."""

    def __post_init__(self) -> None:
        seeds(self, "seeds")
        ascending(self, "buckets")
        needed = {f"hierarchical-{self.k}", f"topk-{self.k}"}
        rule = f"{' and '.join(sorted(needed))}, as `buckets` ends at {self.k}"
        require(len(self.arms) == 2 and set(self.arms) == needed, "arms", self.arms, rule)
        at_least(2, self, "latents", "examples", "window")
        least = self.examples * NEGATIVES
        require(self.pool >= least, "pool", self.pool, f"at least {NEGATIVES} times `examples`, which is {least}")
        one_of(DTYPES, self, "encoder_dtype")

    @property
    def k(self) -> int:
        """Latents read per token."""
        return self.buckets[-1]

    def ranks(self) -> dict[str, tuple[int, int]]:
        """{name: (first, last rank)} of each bucket."""
        firsts = [1, *(last + 1 for last in self.buckets[:-1])]
        return {f"{first}-{last}": (first, last) for first, last in zip(firsts, self.buckets, strict=True)}


def marked(example: Example) -> Bool[np.ndarray, " tokens"]:
    """Which tokens of a window in which a latent fires are marked."""
    return example.activations >= HIGHLIGHT * example.activations.max()


def highlight(
    tokens: Int[np.ndarray, " tokens"], marks: Bool[np.ndarray, " tokens"], tokenizer: PreTrainedTokenizerBase
) -> str:
    """The window's text with each run of marked tokens between << and >>."""
    cuts = np.flatnonzero(np.diff(marks)) + 1
    pieces = []
    for run, mark in zip(np.split(tokens, cuts), marks[np.append(0, cuts)], strict=True):
        text = str(tokenizer.decode(run.tolist()))
        if mark:
            inner = text.lstrip(" ")
            text = " " * (len(text) - len(inner)) + f"<<{inner}>>"
        pieces.append(text)
    return "".join(pieces)


@dataclass(frozen=True)
class Pool:
    """Random windows of one cache with random tokens marked, embedded once for all latents read from that cache.

    A latent's silent windows are chosen so that they bear as many marks as those in which it fires: else the number of
    marks alone would tell them apart.
    """

    windows: Int[np.ndarray, " pool"]
    """Indices of windows, in ascending order."""
    marks: Int[np.ndarray, " pool"]
    """How many tokens are marked, from one to all, spread evenly over the logarithm."""
    vectors: Float[Tensor, "pool width"]

    @classmethod
    def embed(
        cls,
        contexts: Contexts,
        size: int,
        tokenizer: PreTrainedTokenizerBase,
        encoder: SentenceEncoder,
        generator: np.random.Generator,
    ) -> "Pool":
        """Draw and embed `size` windows, or all where there are fewer."""
        windows = np.sort(generator.choice(contexts.windows, min(size, contexts.windows), replace=False))
        texts, counts = [], []
        for window in windows:
            tokens = contexts.token[slice(*contexts.starts[window : window + 2])]
            count = int(np.exp(generator.uniform(0, np.log(len(tokens) + 1))))
            texts.append(highlight(tokens, generator.permutation(len(tokens)) < count, tokenizer))
            counts.append(count)
        return cls(windows, np.array(counts), encoder.embed(texts))

    def silent(self, active: Int[np.ndarray, " active"]) -> Int[np.ndarray, " silent"]:
        """Places in the pool of windows other than `active`."""
        return np.flatnonzero(~np.isin(self.windows, active))

    def match(
        self, silent: Int[np.ndarray, " silent"], marks: Int[np.ndarray, " examples"], generator: np.random.Generator
    ) -> Int[np.ndarray, "examples negatives"]:
        """For each window with so many marks, NEGATIVES of the places `silent` with nearly as many; each place once."""
        free = generator.permutation(silent)
        chosen = np.empty((len(marks), NEGATIVES), dtype=np.int64)
        for example in generator.permutation(len(marks)):
            distance = np.abs(np.log(self.marks[free] / marks[example]))
            nearest = np.argsort(distance, kind="stable")[:NEGATIVES]
            chosen[example] = free[nearest]
            free = np.delete(free, nearest)
        return chosen


def example_score(
    positives: Float[Tensor, "examples width"], negatives: Float[Tensor, "examples negatives width"]
) -> tuple[float, float]:
    """(AUROC, delta) of one latent from unit vectors of windows in which it fires, each with silent ones beside it.

    Each positive and its negatives are in turn the queries q, scored by s(q) = mean similarity to the other positives
    less mean similarity to the other negatives. AUROC is the chance that s of the positive is above s of one of its
    negatives (ties count one half), delta the mean difference of the two, both averaged over turns. Queries of a turn
    never are among its examples: AUROC is 0.5 on average where positives and negatives are drawn alike.
    """
    n, ratio, _ = negatives.shape
    others = (positives.sum(0) - positives) / (n - 1)
    other_negatives = (negatives.sum((0, 1)) - negatives.sum(1)) / ((n - 1) * ratio)
    direction = others - other_negatives
    positive = (positives * direction).sum(1, keepdim=True)
    negative = torch.einsum("nrw,nw->nr", negatives, direction)
    wins = (positive > negative).double() + 0.5 * (positive == negative).double()
    return float(wins.mean()), float((positive - negative).mean())


def score_latents(
    contexts: Contexts,
    pool: Pool,
    config: InterpretConfig,
    tokenizer: PreTrainedTokenizerBase,
    encoder: SentenceEncoder,
    generator: np.random.Generator,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(scores, counts) of one dictionary, bucket by bucket.

    A window belongs to the bucket in which the latent's best rank in it lies: reading up to the bucket's last rank
    shows it, stopping before the first does not. One latent may be scored in several buckets.

    scores: `bucket`, `latent`, `density` (share of tokens), `median_rank`, `marks` (mean per window), `auroc`, `delta`.
    counts of latents: `bucket`, `firing` (in at least one window), of them `rare` (in fewer than config.examples),
    `never_silent` (in nearly all of the pool), the rest `scorable`, and `scored`.
    """
    active = [contexts.active(latent) for latent in range(contexts.latents)]
    silent = np.array([len(pool.silent(each.windows)) for each in active])
    density, median_rank = contexts.density(), contexts.median_rank()
    drawn: list[tuple[str, int, list[Example]]] = []
    counts = []
    for bucket, (first, last) in config.ranks().items():
        windows = np.array([((each.ranks >= first) & (each.ranks <= last)).sum() for each in active])
        often = windows >= config.examples
        scorable = np.flatnonzero(often & (silent >= NEGATIVES * config.examples))
        chosen = sorted(generator.permutation(scorable)[: config.latents].tolist())
        for latent in chosen:
            examples = contexts.quantiles(latent, config.examples, generator, ranks=(first, last))
            drawn.append((bucket, latent, examples))
        firing, rare = int((windows > 0).sum()), int(((windows > 0) & ~often).sum())
        counts.append((bucket, firing, rare, firing - rare - len(scorable), len(scorable), len(chosen)))
    vectors = encoder.embed([highlight(e.tokens, marked(e), tokenizer) for _, _, examples in drawn for e in examples])
    scores = []
    for i, (bucket, latent, examples) in enumerate(drawn):
        marks = np.array([marked(example).sum() for example in examples])
        negatives = pool.vectors[pool.match(pool.silent(active[latent].windows), marks, generator)]
        positives = vectors[i * config.examples : (i + 1) * config.examples]
        described = (latent, float(density[latent]), float(median_rank[latent]), float(marks.mean()))
        scores.append((bucket, *described, *example_score(positives, negatives)))
    return pl.DataFrame(scores, SCORES, orient="row"), pl.DataFrame(counts, COUNTS, orient="row")


def random_directions(cache: ActivationCache, latents: int, k: int, seed: int) -> SAE:
    """A control: an untrained SAE for raw residuals, its latents random unit directions of the normalised ones."""
    made = SAE(cache.d_model, latents, k, generator=torch.Generator().manual_seed(seed))
    return made.fold(cache.mean, cache.statistics.scale)


def neurons(cache: ActivationCache, k: int) -> SAE:
    """A control: each coordinate of the normalised residual in both signs as a latent, 2 d_model of them."""
    made = SAE(cache.d_model, 2 * cache.d_model, k)
    axes = torch.eye(cache.d_model)
    with torch.no_grad():
        made.W_enc.copy_(torch.cat([axes, -axes]))
        made.W_dec.copy_(made.W_enc)
    return made.fold(cache.mean, cache.statistics.scale)


@dataclass(frozen=True)
class ScoreTensor:
    """AUROC of every subject as dense arrays; NaN where a bucket has fewer latents to score than were asked for."""

    scores: dict[str, Float[np.ndarray, "seeds buckets latents"]]

    @classmethod
    def of(cls, scores: pl.DataFrame, config: InterpretConfig) -> "ScoreTensor":
        """From a table with columns `subject`, `seed`, `bucket`, `auroc`."""
        arrays = {}
        for subject in scores["subject"].unique(maintain_order=True):
            mine = scores.filter(pl.col("subject") == subject)
            seeds = config.seeds if subject in config.arms else sorted(mine["seed"].unique())
            array = np.full((len(seeds), len(config.buckets), config.latents), np.nan)
            for i, seed in enumerate(seeds):
                for j, bucket in enumerate(config.ranks()):
                    found = mine.filter((pl.col("seed") == seed) & (pl.col("bucket") == bucket))["auroc"].to_numpy()
                    array[i, j, : len(found)] = found
            arrays[str(subject)] = array
        return cls(arrays)

    def mean(self, subject: str, seed: int, weights: Float[np.ndarray, " latents"]) -> Float[np.ndarray, " buckets"]:
        """Weighted mean over latents in each bucket; NaN where there are none. A control's one seed stands for all.

        A bucket of few latents, all of which a resampling left out, keeps its plain mean.
        """
        array = self.scores[subject]
        chosen = array[seed if len(array) > 1 else 0]
        present = ~np.isnan(chosen)
        share = np.where((present @ weights)[:, None] > 0, present * weights, present)
        with np.errstate(invalid="ignore"):
            return (share * np.nan_to_num(chosen)).sum(axis=1) / share.sum(axis=1)

    def least_difference(
        self, subject: str, others: Sequence[str], seed: int, weights: Float[np.ndarray, " latents"]
    ) -> float:
        """Smallest, over buckets, of mean AUROC(subject) less that of the best of `others` there."""
        best = np.fmax.reduce([self.mean(other, seed, weights) for other in others])
        return float(np.nanmin(self.mean(subject, seed, weights) - best))
