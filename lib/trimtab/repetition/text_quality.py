"""Quality of continuations beside their repetition, and a rule that whole sets of texts must pass.

One minus seq-rep-n alone is won by random tokens, coherence by loops, and likelihood by copying. So nothing is said of
a set of texts by one of them.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sacrebleu.metrics import BLEU
from sklearn.cluster import KMeans
from torch import Tensor

from trimtab.errors import InputError
from trimtab.repetition.ngrams import gram_ids

FRONTIER_SCALE = 5.0
"""c of Pillutla et al. 2021."""
MIXTURES = 25
"""Points of the frontier."""
MTLD_WORDS = 10
"""MTLD of a shorter text says nothing."""
MOST_REPETITION = 0.1
"""What seq-rep-4 may be above that of human text."""
MOST_NATS = 1.0
"""What -log p a token may be above that of human text."""
LEAST_NATS = 0.25
"""The share of human text's -log p a token that must be there: greedy text may be likelier, within limits."""
MOST_COPIED = 0.2
"""What the share of n-grams out of the prefix may be above that of human text."""
COHERENCE_LOSS = 0.2
"""What the cosine of prefix and continuation may be below that of human text."""


def coherence(prefix: Float[Tensor, "texts d"], continuation: Float[Tensor, "texts d"]) -> Float[Tensor, " texts"]:
    """Cosine of each prefix's embedding with its continuation's. Loops score high."""
    return F.cosine_similarity(prefix, continuation, dim=1)


def copied(
    prefix: Int[Tensor, "texts before"], continuation: Int[Tensor, "texts after"], n: int = 4
) -> Float[Tensor, " texts"]:
    """Share of each continuation's n-grams that stand in its prefix, fp64. NaN for continuations shorter than n."""
    before = prefix.shape[1]
    ids = gram_ids(torch.cat([prefix, continuation], dim=1), n)  # those across the seam are neither's
    source, made = ids[:, : max(0, before - n + 1)], ids[:, before:]
    return (made[:, :, None] == source[:, None, :]).any(dim=2).double().mean(dim=1)


def self_bleu(texts: Sequence[str], sample: int = 100, seed: int = 0) -> float:
    """Mean BLEU-4 of each text against all others (Zhu et al. 2018), 0 to 1; high: the texts resemble each other.

    Of `sample` texts drawn without replacement, where there are more: it grows with their number. Sentence BLEU of
    sacrebleu: 13a tokens, n-grams no longer than the text, and exponential smoothing, by which the k-th order without a
    match counts as 1 / 2^k matches. Raises InputError for fewer than two texts.
    """
    if len(texts) < 2:
        raise InputError(f"Self-BLEU compares texts with each other: give at least two, not {len(texts)}.")
    size = min(sample, len(texts))
    chosen = [texts[i] for i in np.random.default_rng(seed).choice(len(texts), size, replace=False)]
    bleu = BLEU(effective_order=True, smooth_method="exp")
    scores = [bleu.sentence_score(text, chosen[:i] + chosen[i + 1 :]).score for i, text in enumerate(chosen)]
    return float(np.mean(scores)) / 100


def mtld(texts: Sequence[str]) -> float:
    """Mean measure of textual lexical diversity (McCarthy and Jarvis 2010): over how many words the share of distinct
    ones stays above 0.72, forwards and backwards averaged; high: diverse. Texts of fewer than `MTLD_WORDS` words,
    numbers not counted, are left out; NaN where none is left."""
    from lexicalrichness import LexicalRichness  # it imports matplotlib, in seconds

    read = [LexicalRichness(text) for text in texts]
    found = [each.mtld(threshold=0.72) for each in read if each.words >= MTLD_WORDS]
    return float(np.mean(found)) if found else math.nan


def zlib_ratio(texts: Sequence[str]) -> float:
    """Mean of compressed bytes / bytes, with zlib at its strongest; low: repetitive. It falls with length, from more
    than 1: compare equal lengths. Empty texts are left out; NaN where none is left."""
    encoded = [text.encode(errors="replace") for text in texts if text]
    found = [len(zlib.compress(text, 9)) / len(text) for text in encoded]
    return float(np.mean(found)) if found else math.nan


def embedding_mauve(p: Float[Tensor, "n d"], q: Float[Tensor, "m d"], clusters: int, seeds: Sequence[int]) -> float:
    """How alike two sets of texts are as distributions, by their embeddings: 1 for the same set, near 0 for two with
    nothing in common.

    The construction of MAUVE (Pillutla et al. 2021): k-means over both sets makes each a histogram; then the area under
    their divergence frontier; here the mean over several seeds of k-means. **Not comparable with published MAUVE**,
    which clusters states of GPT-2 large: only with itself, at the same encoder, numbers of texts and clusters, for it
    is biased and noisy where texts are few. Raises InputError for an empty set, fewer than two clusters or more than
    embeddings, and without a seed.
    """
    if not len(p) or not len(q) or not seeds or not 2 <= clusters <= len(p) + len(q):
        raise InputError(
            f"{clusters} clusters of {len(p)} + {len(q)} embeddings with {len(seeds)} seeds: give two sets, at least 2 "
            "clusters, no more than embeddings, and a seed."
        )
    both = torch.cat([p, q]).double().cpu().numpy()
    areas = []
    for seed in seeds:
        labels = KMeans(clusters, n_init=1, random_state=seed).fit_predict(both)
        mine, others = (np.bincount(side, minlength=clusters) / len(side) for side in np.split(labels, [len(p)]))
        areas.append(frontier_area(mine, others))
    return float(np.mean(areas))


def frontier_area(p: Float[np.ndarray, " bins"], q: Float[np.ndarray, " bins"]) -> float:
    """Area under the points (exp(-c KL(q || r)), exp(-c KL(p || r))) of the mixtures r = w p + (1 - w) q, with (0, 1)
    and (1, 0) at the ends."""
    points = [(0.0, 1.0), (1.0, 0.0)]
    for weight in np.linspace(1e-6, 1 - 1e-6, MIXTURES):
        mixture = weight * p + (1 - weight) * q
        points.append((math.exp(-FRONTIER_SCALE * _kl(q, mixture)), math.exp(-FRONTIER_SCALE * _kl(p, mixture))))
    x, y = np.array(sorted(points, key=lambda point: (point[0], -point[1]))).T
    return float(np.trapezoid(y, x))


def _kl(p: Float[np.ndarray, " bins"], q: Float[np.ndarray, " bins"]) -> float:
    there = p > 0
    # Rounding below 0 would put a point beyond the curve's end at x = 1.
    return max(0.0, float((p[there] * np.log(p[there] / q[there])).sum()))


@dataclass(frozen=True)
class Scores:
    """A set of continuations in four numbers, each a mean over texts."""

    seq_rep_4: float
    nats: float
    """-log p a token under the base model as it was before training."""
    coherence: float
    copied: float
    """Share of 4-grams that stand in the prefix."""


def rejected_by(scores: Scores, human: Scores) -> list[str]:
    """The checks that a set of texts fails beside the human continuations of the same prefixes; none: it passes.

    repetitive, improbable (gibberish), too probable (loops and copies), copied, incoherent. A score that is not a
    number fails. Raises InputError where a human one is not a finite number.
    """
    if not all(map(math.isfinite, vars(human).values())):
        raise InputError(f"The human row must be finite numbers, not {human}.")
    passed = {
        "repetitive": scores.seq_rep_4 <= human.seq_rep_4 + MOST_REPETITION,
        "improbable": scores.nats <= human.nats + MOST_NATS,
        "too probable": scores.nats >= human.nats * LEAST_NATS,
        "copied": scores.copied <= human.copied + MOST_COPIED,
        "incoherent": scores.coherence >= human.coherence - COHERENCE_LOSS,
    }
    return [name for name, fine in passed.items() if not fine]
