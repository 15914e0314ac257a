"""k-sparse probing: how well a few latents tell the labels that the corpus itself carries.

The k latents whose means differ most between two classes are chosen on training passages, a logistic regression reads
them, and passages of other presidents (or other articles) test it (Gurnee et al. 2023; SAEBench, Karvonen et al. 2025).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from trimtab.claims import RESAMPLES
from trimtab.errors import InputError
from trimtab.sae.passages import TASKS, Passages
from trimtab.validation import ascending, at_least, require

DENSE_PENALTIES = (1e-3, 1e-2, 1e-1)
"""Grid of C, the inverse penalty of the dense probe."""
INNER_FOLDS = 3
"""Folds of the training part in which that penalty is chosen."""


@dataclass(frozen=True)
class ProbeConfig:
    """What is compared, and on how much text."""

    arm: str = "hierarchical-64"
    """The SAE of the claim."""
    baseline: str = "topk-64"
    """The SAE that it is compared with."""
    budgets: tuple[int, ...] = (8, 16, 64)
    """Latents read per token, ascending. Claims are about the largest."""
    sparsities: tuple[int, ...] = (1, 2, 5, 20)
    """Latents that a probe may use."""
    passage_tokens: int = 64
    """Consecutive tokens in a passage."""
    passages_per_document: int = 3
    """Passages drawn from each document that has so many in the cache."""
    folds: int = 5
    """Folds of the cross-validation; no group of documents is in two."""
    shuffles: int = 5
    """Random permutations of the labels, for the control."""

    def __post_init__(self) -> None:
        at_least(1, self, "passage_tokens", "passages_per_document", "shuffles")
        ascending(self, "budgets", "sparsities")
        at_least(2, self, "folds")
        require(self.baseline != self.arm, "baseline", self.baseline, "another arm than `arm`")


class Task(NamedTuple):
    """One label to tell, and the folds to tell it in: the same for every representation."""

    name: str
    rows: Int[np.ndarray, " labelled"]
    """The passages that have the label."""
    labels: Bool[np.ndarray, " labelled"]
    groups: np.ndarray
    """What each is near relative to, as strings."""
    folds: list[tuple[np.ndarray, np.ndarray]]
    """(training, test) indices into `rows`; no group is in both."""


def tasks_of(passages: Passages, config: ProbeConfig, seed: int, *, unit: str = "group") -> list[Task]:
    """The tasks with enough groups on either side. Raises InputError where there is none.

    Enough are as many as there are folds, and three in the training part of each, which the dense probe splits again.
    `unit`: the column of the passages' table whose values are never split between training and test.
    """
    found = []
    for name in TASKS:
        table = passages.table.with_row_index("row").drop_nulls(name)
        labels, groups = table[name].to_numpy(), table[unit].cast(pl.String).to_numpy()
        if _smaller_side(labels, groups) < config.folds:
            continue
        folds = _folds(labels, groups, config.folds, seed)
        if min(_smaller_side(labels[train], groups[train]) for train, _ in folds) >= INNER_FOLDS:
            found.append(Task(name, table["row"].to_numpy().astype(np.int64), labels, groups, folds))
    if not found:
        raise InputError(
            f"sae_probe: no label has enough groups of documents for {config.folds} folds: cache more text."
        )
    return found


def shuffled(task: Task, passages: Passages, config: ProbeConfig, seed: int) -> Task:
    """A control: the same passages and groups with the labels of documents permuted, and folds anew."""
    documents = passages.table["document"].to_numpy()[task.rows]
    _, first, which = np.unique(documents, return_index=True, return_inverse=True)
    labels = np.random.default_rng(seed).permutation(task.labels[first])[which]
    return task._replace(labels=labels, folds=_folds(labels, task.groups, config.folds, seed))


def strongest(
    features: Float[np.ndarray, "passages width"], labels: Bool[np.ndarray, " passages"], n: int, *, plain: bool = False
) -> Int[np.ndarray, " n"]:
    """The n columns whose class means lie furthest apart, in units of the column's standard deviation.

    With `plain` in the columns' own units: SAEBench's rule, which favours coordinates for their scale. That of the
    residual stream's differs more than tenfold; the logistic regression sees standardised columns either way.
    """
    apart = np.abs(features[labels].mean(axis=0) - features[~labels].mean(axis=0))
    if not plain:
        spread = features.std(axis=0)
        apart = np.divide(apart, spread, out=np.zeros_like(apart), where=spread > 0)
    return np.argsort(-apart, kind="stable")[:n]


def sparse_probe(
    features: Float[np.ndarray, "passages width"], task: Task, sparsities: Sequence[int], *, plain: bool = False
) -> dict[int, Bool[np.ndarray, " labelled"]]:
    """For each k, whether each passage of the task is told right by a probe that saw none of its group."""
    right = {k: np.zeros(len(task.rows), dtype=bool) for k in sparsities}
    for train, test in task.folds:
        x, y = features[task.rows[train]], task.labels[train]
        order = strongest(x, y, max(sparsities), plain=plain)
        for k in sparsities:
            probe = _logistic().fit(x[:, order[:k]], y)
            right[k][test] = probe.predict(features[np.ix_(task.rows[test], order[:k])]) == task.labels[test]
    return right


def dense_probe(features: Float[np.ndarray, "passages width"], task: Task, seed: int) -> Bool[np.ndarray, " labelled"]:
    """The same with all columns: the upper reference. Its penalty is chosen within each fold's training groups."""
    right = np.zeros(len(task.rows), dtype=bool)
    for train, test in task.folds:
        inner = _folds(task.labels[train], task.groups[train], INNER_FOLDS, seed)
        grid = {"logisticregression__C": DENSE_PENALTIES}
        search = GridSearchCV(_logistic(), grid, scoring="balanced_accuracy", cv=inner)
        search.fit(features[task.rows[train]], task.labels[train])
        right[test] = search.predict(features[task.rows[test]]) == task.labels[test]
    return right


def tally(task: Task, k: int, right: Bool[np.ndarray, " labelled"]) -> pl.DataFrame:
    """Sums by group: columns `task`, `k`, `group`, `mass`, `right`.

    A passage has the mass 1 / (2 passages of its class), so that balanced accuracy is the sum of `right` over `mass`.
    """
    mass = 0.5 / np.where(task.labels, task.labels.sum(), (~task.labels).sum())
    rows = pl.DataFrame({"group": task.groups, "mass": mass, "right": mass * right})
    sums = rows.group_by("group").agg(pl.col("mass", "right").sum()).sort("group")
    return sums.select(pl.lit(task.name).alias("task"), pl.lit(k).alias("k"), pl.all())


def probe(
    features: Float[np.ndarray, "passages width"],
    tasks: Sequence[Task],
    sparsities: Sequence[int],
    *,
    representation: str,
    seed: int = 0,
    plain: bool = False,
) -> pl.DataFrame:
    """Sparse probes of one representation on all tasks: the columns of `tally` after `representation` and `seed`."""
    parts = [
        tally(task, k, right)
        for task in tasks
        for k, right in sparse_probe(features, task, sparsities, plain=plain).items()
    ]
    return pl.concat(parts).select(pl.lit(representation).alias("representation"), pl.lit(seed).alias("seed"), pl.all())


@dataclass(frozen=True)
class Scores:
    """Tallies as dense arrays by representation, task and k, over training seeds and groups of documents."""

    right: Mapping[tuple[str, str, int], Float[np.ndarray, "seeds groups"]]
    mass: Mapping[tuple[str, str, int], Float[np.ndarray, "seeds groups"]]
    groups: int
    """Groups of all tasks together."""

    @classmethod
    def of(cls, table: pl.DataFrame) -> "Scores":
        """From the tables of `probe`, joined."""
        groups = table["group"].unique().sort()
        number = pl.col("group").replace_strict(groups, np.arange(len(groups)), return_dtype=pl.Int64)
        right: dict[Any, np.ndarray] = {}
        mass: dict[Any, np.ndarray] = {}
        for key, part in table.with_columns(number).group_by("representation", "task", "k", maintain_order=True):
            seeds = np.unique(part["seed"].to_numpy(), return_inverse=True)[1]
            place = (seeds, part["group"].to_numpy())
            for name, arrays in (("right", right), ("mass", mass)):
                arrays[key] = np.zeros((seeds.max() + 1, len(groups)))
                arrays[key][place] = part[name].to_numpy()
        return cls(right, mass, len(groups))

    def accuracy(
        self, representation: str, task: str, k: int, seed: int, weights: Float[np.ndarray, " groups"]
    ) -> float:
        """Balanced accuracy of one training seed with groups weighted; chance where no group of the task has weight.

        A representation without training seeds has one row, which stands for all.
        """
        right, mass = self.right[representation, task, k], self.mass[representation, task, k]
        total = mass[seed % len(mass)] @ weights
        return float(right[seed % len(right)] @ weights / total) if total else 0.5

    def difference(
        self,
        one: str,
        other: str,
        tasks: Sequence[str],
        sparsities: Sequence[int],
        seed: int,
        weights: Float[np.ndarray, " groups"],
    ) -> float:
        """Balanced accuracy of `one` less that of `other`, mean over tasks and k."""
        cells = [(task, k, seed, weights) for task in tasks for k in sparsities]
        return float(np.mean([self.accuracy(one, *cell) - self.accuracy(other, *cell) for cell in cells]))

    def summary(self, seed: int) -> pl.DataFrame:
        """Columns `representation`, `task`, `k`, `accuracy` (balanced, mean over training seeds), `low` and `high`.

        The interval (95 %, percentiles) is over resampled groups of documents, with training seeds as they are.
        """
        draws = np.random.default_rng(seed).multinomial(self.groups, np.full(self.groups, 1 / self.groups), RESAMPLES)
        rows = []
        for key, right in self.right.items():
            total = self.mass[key] @ draws.T
            drawn = np.divide(right @ draws.T, total, out=np.full_like(total, 0.5), where=total > 0).mean(axis=0)
            effect = (right.sum(axis=1) / self.mass[key].sum(axis=1)).mean()
            rows.append((*key, float(effect), *np.percentile(drawn, [2.5, 97.5]).tolist()))
        columns = ["representation", "task", "k", "accuracy", "low", "high"]
        return pl.DataFrame(rows, schema=columns, orient="row")


def _folds(
    labels: Bool[np.ndarray, " passages"], groups: np.ndarray, folds: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(labels, labels, groups))


def _smaller_side(labels: Bool[np.ndarray, " passages"], groups: np.ndarray) -> int:
    """Groups of the class that has fewer."""
    return min(len(np.unique(groups[side])) for side in (labels, ~labels))


def _logistic() -> Any:
    """SAEBench's probe, on standardised columns: classes weigh the same, C = 1."""
    return make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
