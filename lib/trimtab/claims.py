"""Claims stated before they are tested, and verdicts that are computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import stats

from trimtab.errors import InputError

RESAMPLES = 2000
Outcome = Literal["held", "not held", "inconclusive"]


@dataclass(frozen=True)
class Claim:
    """One comparison with its threshold. It holds when `statistic` lies on the named side of `threshold`."""

    name: str
    """A short handle, unique within the project."""
    text: str
    """The claim in one sentence."""
    statistic: str
    """What is measured, and its unit."""
    direction: Literal["below", "above"]
    threshold: float

    def judge(self, effect: float, low: float, high: float, n: str) -> "Verdict":
        """Held where the whole 95 % interval [low, high] is on the claimed side, not held where all of it is on the
        other, inconclusive where it spans the threshold. `n` says over what the interval was taken."""
        if not low <= effect <= high:
            raise InputError(f"{self.name}: effect {effect} lies outside its interval [{low}, {high}].")
        above, below = low > self.threshold, high < self.threshold
        claimed, opposed = (above, below) if self.direction == "above" else (below, above)
        outcome: Outcome = "held" if claimed else "not held" if opposed else "inconclusive"
        rule = f"{self.direction} {self.threshold:g}"
        return Verdict(self.name, self.text, self.statistic, rule, outcome, effect, low, high, n)


@dataclass(frozen=True)
class Verdict:
    """A judged claim, with its effect, 95 % interval and n."""

    name: str
    text: str
    statistic: str
    rule: str
    outcome: Outcome
    effect: float
    low: float
    high: float
    n: str


def bootstrap(
    statistic: Callable[[Float[np.ndarray, "seeds documents"]], float], seeds: int, documents: int, *, seed: int = 0
) -> tuple[float, float, float]:
    """(effect, low, high): a 95 % percentile interval over documents and training seeds, both resampled.

    `statistic` takes the weight of every (seed, document) pair: all ones give the effect; a resample weighs each by how
    often its seed and its document were drawn. With few seeds the interval says little of their variation.
    """
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(RESAMPLES):
        by_seed = np.bincount(generator.integers(seeds, size=seeds), minlength=seeds)
        by_document = np.bincount(generator.integers(documents, size=documents), minlength=documents)
        draws.append(statistic(np.outer(by_seed, by_document).astype(float)))
    effect = statistic(np.ones((seeds, documents)))
    low, high = np.quantile(draws, [0.025, 0.975])
    return effect, min(float(low), effect), max(float(high), effect)


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): Student's 95 % interval of a mean, over seeds. One value gives an unbounded interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, -float("inf"), float("inf")
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return mean, mean - half, mean + half


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """A Markdown table, one row a claim."""
    head = "| claim | verdict | statistic | effect | 95 % interval | held if | n |\n|---|---|---|---|---|---|---|"
    rows = [
        f"| {v.text} | **{v.outcome}** | {v.statistic} | {v.effect:.3g} | {v.low:.3g} to {v.high:.3g} "
        f"| {v.rule} | {v.n} |"
        for v in verdicts
    ]
    return "\n".join([head, *rows])
