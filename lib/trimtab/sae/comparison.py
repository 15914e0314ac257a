"""Comparing arms from their stored held-out errors: tables, and ratios under resampling."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float

from trimtab.errors import InputError
from trimtab.files import read_parquet
from trimtab.sae.config import Arm


@dataclass(frozen=True)
class Sides:
    """The arms of a comparison, by their part in it."""

    hierarchical: Arm
    """HierarchicalTopK over J = 1..K: the one SAE."""
    single: tuple[Arm, ...]
    """TopK arms by k."""
    others: tuple[Arm, ...]
    """Further baselines, in the order given."""

    @classmethod
    def of(cls, arms: Sequence[str]) -> "Sides":
        """Raises InputError unless there is one hierarchical-K, and a topk-K for the same K."""
        parsed = [Arm.parse(arm) for arm in arms]
        hierarchical = [arm for arm in parsed if arm.kind == "hierarchical"]
        single = sorted((arm for arm in parsed if arm.kind == "topk"), key=lambda arm: arm.k)
        if len(hierarchical) != 1 or not single or single[-1].k != hierarchical[0].k:
            raise InputError(
                "`arms` must hold one hierarchical-K, topk-K for the same K, and no topk of a larger one, "
                f"not {list(arms)}."
            )
        others = tuple(arm for arm in parsed if arm.kind not in ("hierarchical", "topk"))
        return cls(hierarchical[0], tuple(single), others)

    @property
    def truncated(self) -> Arm:
        """The TopK arm of the same K, which is also read below it."""
        return self.single[-1]

    def other(self, kind: str) -> Arm | None:
        """The further baseline of a kind with the same K, where it was trained."""
        wanted = Arm(kind, self.hierarchical.k)
        return wanted if wanted in self.others else None


def read_errors(folder: Path, arms: Sequence[str]) -> pl.DataFrame:
    """The `errors.parquet` of every arm under `folder`, with a column `arm`. Raises InputError for a missing arm."""
    return _read(folder, arms, "errors.parquet")


def read_readings(folder: Path, arms: Sequence[str]) -> pl.DataFrame:
    """The `readings.parquet` of every arm: columns `arm`, `seed`, `k`, and the measures of `notebooks/sae.ipynb`."""
    return _read(folder, arms, "readings.parquet")


def fvu_table(errors: pl.DataFrame) -> pl.DataFrame:
    """Columns `arm`, `k`, `fvu` (pooled over seeds), `low` and `high` (smallest and largest seed)."""
    by_seed = (
        errors.group_by("arm", "k", "seed", maintain_order=True)
        .agg(pl.col("error").sum(), pl.col("total").sum())
        .with_columns((pl.col("error") / pl.col("total")).alias("fvu"))
    )
    return by_seed.group_by("arm", "k", maintain_order=True).agg(
        (pl.col("error").sum() / pl.col("total").sum()).alias("fvu"),
        pl.col("fvu").min().alias("low"),
        pl.col("fvu").max().alias("high"),
    )


def fvu_of(table: pl.DataFrame, arm: Arm, k: int) -> float:
    """One entry of `fvu_table`."""
    return table.filter((pl.col("arm") == str(arm)) & (pl.col("k") == k))["fvu"].item()


def alive_difference(readings: pl.DataFrame, one: Arm, other: Arm) -> list[float]:
    """Alive share of `one` at its K less that of `other` at its own, seed by seed."""
    shares = {
        arm: dict(
            readings.filter((pl.col("arm") == str(arm)) & (pl.col("k") == arm.k)).select("seed", "alive").iter_rows()
        )
        for arm in (one, other)
    }
    return [shares[one][seed] - shares[other][seed] for seed in sorted(shares[one])]


Weights = Float[np.ndarray, " groups"]
"""A weight for each group of documents: ones, or the counts of a bootstrap sample."""


@dataclass(frozen=True)
class ErrorTensor:
    """Squared errors by arm and k as dense arrays over training seeds and groups of documents."""

    errors: Mapping[tuple[str, int], Float[np.ndarray, "seeds groups"]]
    seeds: int
    groups: int

    @classmethod
    def of(cls, errors: pl.DataFrame, documents: pl.DataFrame) -> "ErrorTensor":
        """From the table of `read_errors`, and `document` -> `source`, `group` of the corpus.

        Documents of a group are near relatives, so the group is the unit that is resampled. Raises InputError unless
        every arm was read with the same seeds on the same documents.
        """
        grouped = (
            errors.join(documents.select("document", "source", "group"), on="document")
            .group_by("arm", "k", "seed", "source", "group")
            .agg(pl.col("error").sum())
            .sort("arm", "k", "seed", "source", "group")
        )
        cells = None
        arrays = {}
        for (arm, k), rows in grouped.group_by("arm", "k", maintain_order=True):
            here = rows.select("seed", "source", "group")
            if cells is not None and not here.equals(cells):
                raise InputError(f"{arm} at k={k} was not read with the seeds and documents of the others.")
            cells = here
            arrays[str(arm), int(str(k))] = rows["error"].to_numpy().reshape(rows["seed"].n_unique(), -1)
        shape = next(iter(arrays.values())).shape
        return cls(arrays, *shape)

    def error(self, arm: Arm, k: int, seed: int, weights: Weights) -> float:
        """Weighted sum of squared errors of one training seed. FVU but for the total, which is the same for all."""
        return float(self.errors[str(arm), k][seed] @ weights)

    def excess(self, one: tuple[Arm, int], other: tuple[Arm, int], seed: int, weights: Weights) -> float:
        """FVU(one) / FVU(other) - 1, each an arm and the k at which it is read."""
        return self.error(*one, seed, weights) / self.error(*other, seed, weights) - 1

    def worst_excess(self, one: Arm, others: Mapping[int, Sequence[Arm]], seed: int, weights: Weights) -> float:
        """Largest, over k, of FVU(one) / FVU(the best of others[k]) - 1, all read at k."""
        ratios = []
        for k, arms in others.items():
            best = min(self.error(arm, k, seed, weights) for arm in arms)
            ratios.append(self.error(one, k, seed, weights) / best - 1)
        return max(ratios)

    def least_excess(self, one: Arm, other: Arm, budgets: Sequence[int], seed: int, weights: Weights) -> float:
        """Smallest, over `budgets`, of FVU(one) / FVU(other) - 1."""
        return min(self.excess((one, k), (other, k), seed, weights) for k in budgets)

    def least_growth(self, one: Arm, other: Arm, budgets: Sequence[int], seed: int, weights: Weights) -> float:
        """Smallest rise of FVU(one) / FVU(other) - 1 from one of `budgets` to the next smaller one."""
        margins = [self.excess((one, k), (other, k), seed, weights) for k in sorted(budgets)]
        return min(smaller - larger for smaller, larger in pairwise(margins))


def _read(folder: Path, arms: Sequence[str], name: str) -> pl.DataFrame:
    for arm in arms:
        if not (folder / arm / name).is_file():
            raise InputError(f"{folder / arm} holds no {name}: run `dvc repro sae@{arm}`.")
    tables = [read_parquet(folder / arm / name).select(pl.lit(arm).alias("arm"), pl.all()) for arm in arms]
    return pl.concat(tables)
