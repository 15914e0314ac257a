"""Arms of pretraining compared on test text: perplexity of recalled tokens and of the others, and what lies between."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from jaxtyping import Float, Int
from matplotlib.axes import Axes

from trimtab.claims import ratio_terms, seeds_and_groups
from trimtab.errors import InputError
from trimtab.files import read_parquet
from trimtab.plots import COLOURS
from trimtab.rebased.pretraining import ARMS
from trimtab.validation import nearest_of

NEEDED = ("softmax", "based", "rebased", "rebased-hybrid", "conv")
"""Arms that the claims are about."""
Part = Literal["overall", "recalled", "others"]
PARTS: tuple[Part, Part, Part] = ("overall", "recalled", "others")
"""All predictions; those whose pair of tokens stood in the block before; the rest."""
Weights = Float[np.ndarray, " groups"]


def check_arms(arms: Sequence[str]) -> None:
    """Raise InputError for a name that is no arm, and where one that a claim needs is missing."""
    for arm in arms:
        if arm not in ARMS:
            raise InputError(f"{arm!r} is not an arm: write any of {', '.join(ARMS)}{nearest_of(arm, ARMS)}.")
    missing = [arm for arm in NEEDED if arm not in arms]
    if missing:
        raise InputError(f"`arms` must hold {', '.join(NEEDED)}; {missing[0]} is missing.")


@dataclass(frozen=True)
class Losses:
    """Nats of every arm's predictions, summed over the blocks of each group of test documents."""

    nats: dict[tuple[str, Part], Float[np.ndarray, "seeds groups"]]
    """By arm and part (`recalled`, `others`)."""
    counts: dict[Part, Int[np.ndarray, " groups"]]
    """Predictions, by part: the same for every arm."""

    @classmethod
    def read(cls, trained: Path, arms: Sequence[str]) -> "Losses":
        """From every arm's `losses.parquet`. Raises InputError where one is missing or was read on other blocks."""
        nats: dict[tuple[str, Part], np.ndarray] = {}
        first: pl.DataFrame | None = None
        for arm in arms:
            path = trained / arm / "losses.parquet"
            if not path.is_file():
                raise InputError(f"{path} is missing: run `dvc repro pretrain@{arm}`.")
            table = read_parquet(path).group_by("seed", "group").agg(pl.exclude("seed", "group").sum())
            table = table.sort("seed", "group")
            seeds = table["seed"].n_unique()
            same = table.select("seed", "group", "recalled", "others")
            if first is not None and not same.equals(first):
                raise InputError(f"{path} is of other seeds or blocks than {trained / arms[0]}.")
            first = same
            for part in PARTS[1:]:
                nats[arm, part] = table[f"{part}_nats"].to_numpy().reshape(seeds, -1)
        counts: dict[Part, np.ndarray] = {part: table[part].to_numpy().reshape(seeds, -1)[0] for part in PARTS[1:]}
        for part, found in counts.items():
            if not found.any():
                raise InputError(
                    f"No test prediction is among the {part}: choose another `common` in section pretrain."
                )
        return cls(nats, counts)

    @property
    def seeds(self) -> int:
        """Training seeds."""
        return len(next(iter(self.nats.values())))

    @property
    def groups(self) -> int:
        """Groups of test documents that are near relatives: the unit that is resampled."""
        return len(self.counts["others"])

    def mean(self, arm: str, part: Part, seed: int, weights: Weights) -> float:
        """Nats a prediction, of one seed."""
        parts = PARTS[1:] if part == "overall" else (part,)
        predictions = sum(self.counts[each] @ weights for each in parts)
        nats = sum(self.nats[arm, each][seed] @ weights for each in parts)
        return float(nats / predictions) if predictions else 0.0  # a bootstrap sample without any

    def gap(self, arm: str, other: str, part: Part, seed: int, weights: Weights) -> float:
        """Nats by which an arm's mean lies above the other's."""
        return self.mean(arm, part, seed, weights) - self.mean(other, part, seed, weights)

    def perplexity(self, arm: str, part: Part) -> float:
        """exp of the mean over seeds."""
        ones = np.ones(self.groups)
        return float(np.exp(np.mean([self.mean(arm, part, seed, ones) for seed in range(self.seeds)])))

    def interval(self, arm: str, other: str, part: Part, *, seed: int = 0) -> tuple[float, float, float]:
        """(gap, low, high); see `claims.seeds_and_groups`."""
        gap = partial(self.gap, arm, other, part)
        return seeds_and_groups(gap, seeds=self.seeds, groups=self.groups, seed=seed)

    def most_on_recalled(self, arm: str, other: str, *, seed: int = 0) -> tuple[float, float, float]:
        """(lesser of what an arm is ahead of the other by on recalled predictions, and of what that is more than on the
        others, low, high): above 0 where it is ahead on the recalled ones, and there most."""

        def statistic(s: int, weights: Weights) -> float:
            ahead = self.gap(other, arm, "recalled", s, weights)
            return min(ahead, ahead - self.gap(other, arm, "others", s, weights))

        return seeds_and_groups(statistic, seeds=self.seeds, groups=self.groups, seed=seed)

    def closed(self, arm: str, worse: str, better: str, *, seed: int = 0) -> tuple[float, float, float]:
        """(share of the gap between `worse` and `better` that the arm closes, low, high); see
        `claims.ratio_terms`. Unbounded unless there is a gap with its whole interval."""
        sides = (arm, better)

        def statistic(s: int, weights: Weights) -> float:
            mine, whole = ([self.gap(worse, each, "overall", i, weights) for i in range(self.seeds)] for each in sides)
            return float(ratio_terms(mine, whole)[s])

        effect, low, high = seeds_and_groups(statistic, seeds=self.seeds, groups=self.groups, seed=seed)
        gap = partial(self.gap, worse, better, "overall")
        certain = seeds_and_groups(gap, seeds=self.seeds, groups=self.groups, seed=seed)[1] > 0
        return (effect, low, high) if certain else (effect, -np.inf, np.inf)


def plot_gaps(axis: Axes, losses: Losses, arms: Sequence[str], *, seed: int = 0) -> None:
    """Nats above softmax, with intervals: a group for each part, a bar for each other arm."""
    others = [arm for arm in arms if arm != "softmax"]
    width = 0.8 / len(others)
    for i, (arm, colour) in enumerate(zip(others, COLOURS, strict=False)):
        found = np.array([losses.interval(arm, "softmax", part, seed=seed) for part in PARTS])
        places = np.arange(len(PARTS)) + (i - (len(others) - 1) / 2) * width
        error = np.abs(found[:, 1:].T - found[:, 0]) if np.isfinite(found).all() else None
        axis.bar(places, found[:, 0], width, yerr=error, color=colour, label=arm, error_kw={"linewidth": 1})
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(PARTS)), ["all tokens", "recalled tokens", "the others"])
    axis.set(ylabel="nats a token above softmax")
    axis.set_title("Where the arms differ (lower: better)")
    axis.legend(fontsize=8)


def plot_positions(axis: Axes, tables: dict[str, pl.DataFrame]) -> None:
    """Mean loss over seeds by place in the context, an arm a curve."""
    for colour, (arm, table) in zip([COLOURS[-1], *COLOURS], tables.items(), strict=False):
        rows = table.group_by("position", maintain_order=True).agg(pl.col("nats").mean())
        axis.plot(rows["position"], rows["nats"], "o-", color=colour, markersize=3, linewidth=1.2, label=arm)
    axis.set(xlabel="place in the context, tokens", ylabel="nats a token", xscale="log")
    axis.set_title("Use of the context")
    axis.legend(fontsize=8)
