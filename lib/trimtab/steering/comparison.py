"""Comparing arms from their stored answers: tables, gains under resampling, figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float, Int
from matplotlib.axes import Axes

from trimtab.claims import ratio_terms, seeds_and_groups
from trimtab.errors import InputError
from trimtab.files import read_parquet
from trimtab.plots import COLOURS
from trimtab.rl.evaluation import GREEDY
from trimtab.steering.arms import Arm
from trimtab.steering.experiment import accuracy_table

NEEDED = ("steering", "steering-last", "full")
"""Arms that the claims are about."""
BASE = "base"
"""The untrained model, among the controls."""


def check_arms(arms: Sequence[str]) -> None:
    """Raise InputError for a name that is no arm, and where one that a claim needs is missing."""
    for arm in arms:
        Arm(arm)
    missing = [arm for arm in NEEDED if arm not in arms]
    if missing:
        raise InputError(f"`arms` must hold {', '.join(NEEDED)}; {missing[0]} is missing.")


def read_answers(trained: Path, arms: Sequence[str], controls: Path) -> pl.DataFrame:
    """The answers of the controls, then of every arm, with a column `arm`. Raises InputError for a missing file."""
    for folder, stage in [(controls, "steering_controls"), *((trained / arm, f"steering@{arm}") for arm in arms)]:
        if not (folder / "answers.parquet").is_file():
            raise InputError(f"{folder} holds no answers.parquet: run `dvc repro {stage}`.")
    first = read_parquet(controls / "answers.parquet")
    tables = [read_parquet(trained / arm / "answers.parquet") for arm in arms]
    named = [table.select(pl.lit(arm).alias("arm"), pl.all()) for arm, table in zip(arms, tables, strict=True)]
    return pl.concat([first, *named])


def table(answers: pl.DataFrame) -> pl.DataFrame:
    """A row for each arm and task: means over seeds of `experiment.accuracy_table`, and `low` and `high`, the least and
    the most accurate seed, greedily."""
    parts = []
    for (arm,), rows in answers.group_by("arm", maintain_order=True):
        parts.append(accuracy_table(rows).select(pl.lit(arm).alias("arm"), pl.all()))
    seeds = pl.concat(parts, how="diagonal")
    measures = [column for column in seeds.columns if column not in ("arm", "task", "seed")]
    return seeds.group_by("arm", "task", maintain_order=True).agg(
        pl.col("greedy").min().alias("low"), pl.col("greedy").max().alias("high"), pl.col(*measures).mean()
    )


Weights = Float[np.ndarray, " groups"]
"""A weight for each subject: ones, or the counts of a bootstrap sample."""


@dataclass(frozen=True)
class Correct:
    """Whether each arm's greedy completion is right: arrays over training seeds and items of one task. An arm that was
    not trained has the same answers for every seed."""

    arms: Mapping[str, Float[np.ndarray, "seeds items"]]
    """The untrained model among them, as `BASE`."""
    subject: Int[np.ndarray, " items"]
    """Which subject each item asks about, as a number: the unit that is resampled."""

    @property
    def seeds(self) -> int:
        """Training seeds."""
        return len(self.arms[BASE])

    @property
    def items(self) -> int:
        """Questions."""
        return len(self.subject)

    @property
    def groups(self) -> int:
        """Subjects: items of one are near relatives."""
        return int(self.subject.max()) + 1

    @classmethod
    def of(cls, answers: pl.DataFrame, task: str) -> "Correct":
        """From the table of `read_answers`. Raises InputError unless all arms answered the same items, and the trained
        ones with the same seeds."""
        chosen = answers.filter((pl.col("task") == task) & (pl.col("sample") == GREEDY)).sort("seed", "item")
        arrays = {
            str(arm): rows["correct"].to_numpy().reshape(rows["seed"].n_unique(), -1)
            for (arm,), rows in chosen.group_by("arm", maintain_order=True)
        }
        arrays = {name: arrays[name] for name in [BASE, *(each for each in arrays if each != BASE)]}
        seeds = max(len(array) for array in arrays.values())
        items = arrays[BASE].shape[1]
        for name, array in arrays.items():
            if array.shape not in ((1, items), (seeds, items)):
                raise InputError(f"{name} was not read with the seeds and items of the others.")
        return cls.read(arrays, chosen.filter(pl.col("arm") == BASE)["subject"].to_list())

    @classmethod
    def read(cls, arms: Mapping[str, Float[np.ndarray, "_ items"]], subjects: Sequence[str]) -> "Correct":
        """From right answers, a row for each seed or one for all, and the subject of each item."""
        seeds = max(len(array) for array in arms.values())
        numbers = {subject: i for i, subject in enumerate(dict.fromkeys(subjects))}
        repeated = {name: np.repeat(array, seeds // len(array), axis=0) for name, array in arms.items()}
        return cls(repeated, np.array([numbers[subject] for subject in subjects]))

    def accuracy(self, arm: str) -> float:
        """Share of right answers, over seeds and items."""
        return float(self.arms[arm].mean())

    def gain(self, arm: str, seed: int, weights: Weights) -> float:
        """Accuracy of one training seed less that of the untrained model."""
        by_item = weights[self.subject]
        return float((self.arms[arm][seed] - self.arms[BASE][seed]) @ by_item / by_item.sum())

    def share(self, arm: str, other: str, seed: int, weights: Weights) -> float:
        """One seed's term of gain(arm) / gain(other); see `claims.ratio_terms`."""
        mine, whole = ([self.gain(name, s, weights) for s in range(self.seeds)] for name in (arm, other))
        return float(ratio_terms(mine, whole)[seed])

    def interval(self, arm: str, *, seed: int = 0) -> tuple[float, float, float]:
        """(gain of the arm, low, high); see `claims.seeds_and_groups`."""
        return seeds_and_groups(partial(self.gain, arm), seeds=self.seeds, groups=self.groups, seed=seed)

    def ratio(
        self, arms: Sequence[str], other: str, *, less: str | None = None, seed: int = 0
    ) -> tuple[float, float, float]:
        """(largest gain of the arms / gain of the other, low, high), or what that share is above the share of the arm
        `less`. Unbounded unless the other's gain is above 0 with its whole interval, for of no gain there are no
        shares."""

        def share(s: int, weights: Weights) -> float:
            most = max(self.share(arm, other, s, weights) for arm in arms)
            return most - (0.0 if less is None else self.share(less, other, s, weights))

        effect, low, high = seeds_and_groups(share, seeds=self.seeds, groups=self.groups, seed=seed)
        return (effect, low, high) if self.interval(other, seed=seed)[1] > 0 else (effect, -np.inf, np.inf)


def plot_accuracy(axis: Axes, rows: pl.DataFrame) -> None:
    """A bar for each arm of `table` at one task, with the range over seeds; the untrained model is a dashed line."""
    base = rows.filter(pl.col("arm") == BASE).row(0, named=True)
    others = rows.filter(pl.col("arm") != BASE)
    trained = [
        arm not in ("constant answer", "random vectors", "best prefix", "random-reward") for arm in others["arm"]
    ]
    places = range(len(others))
    spread = [others["greedy"] - others["low"], others["high"] - others["greedy"]]
    colours = [COLOURS[0] if each else COLOURS[6] for each in trained]
    axis.barh(places, others["greedy"], xerr=spread, color=colours, height=0.6, error_kw={"linewidth": 1})
    axis.plot(others["greedy_exact"], places, "|", color="black", markersize=10, label="the answer and nothing else")
    axis.axvline(base["greedy"], color=COLOURS[5], linestyle="--", label="untrained model")
    axis.set_yticks(places, others["arm"].to_list())
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel="greedy accuracy on held-out items")
    axis.set_title("Trained arms (blue) and controls (grey)")
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def plot_rewards(axis: Axes, histories: Mapping[str, pl.DataFrame]) -> None:
    """Mean reward of the rollouts over updates, the mean over seeds smoothed over five updates."""
    for colour, (arm, history) in zip(COLOURS, histories.items(), strict=False):
        mean = history.group_by("update", maintain_order=True).agg(pl.col("reward").mean()).sort("update")
        smooth = mean["reward"].rolling_mean(5, min_samples=1)
        axis.plot(mean["update"], smooth, color=colour, label=arm, linewidth=1.4)
    axis.set(xlabel="update", ylabel="mean reward, of 5 updates", ylim=(0, 1))
    axis.set_title("Rewards of the rollouts")
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
