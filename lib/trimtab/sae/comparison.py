"""Comparing arms from their stored held-out errors: tables, ratios under resampling, and the figure of the front."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float
from matplotlib.axes import Axes

from trimtab.checkpoint import load_tensors
from trimtab.errors import InputError
from trimtab.plots import COLOURS
from trimtab.sae.training import Arm


def read_errors(folder: Path, arms: Sequence[str]) -> pl.DataFrame:
    """The `errors.parquet` of every arm under `folder`, with a column `arm`. Raises InputError for a missing arm."""
    return _read(folder, arms, "errors.parquet")


def read_alive(folder: Path, arms: Sequence[str]) -> pl.DataFrame:
    """The `alive.parquet` of every arm: columns `arm`, `seed`, `k`, `alive`, `fvu`."""
    return _read(folder, arms, "alive.parquet")


def sides(arms: Sequence[str]) -> tuple[Arm, list[Arm]]:
    """(the HierarchicalTopK arm, the TopK arms by k). Raises InputError unless there is one and at least one."""
    parsed = [Arm.parse(arm) for arm in arms]
    hierarchical = [arm for arm in parsed if arm.objective == "hierarchical"]
    single = sorted((arm for arm in parsed if arm.objective == "topk"), key=lambda arm: arm.k)
    if len(hierarchical) != 1 or not single:
        raise InputError(f"sae_compare: arms must hold one hierarchical-K and at least one topk-K, not {list(arms)}.")
    if hierarchical[0].k < single[-1].k:
        raise InputError(f"sae_compare: {hierarchical[0]} is not trained up to the k of {single[-1]}.")
    return hierarchical[0], single


def site_of(folder: Path) -> int:
    """The site that an arm's SAEs were trained on."""
    file = min(folder.glob("seed-*.safetensors"))
    return int(load_tensors(file)[1]["site"])


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


def alive_difference(alive: pl.DataFrame, one: Arm, other: Arm) -> list[float]:
    """Alive share of `one` at its K less that of `other` at its own, seed by seed."""
    shares = {
        arm: dict(
            alive.filter((pl.col("arm") == str(arm)) & (pl.col("k") == arm.k)).select("seed", "alive").iter_rows()
        )
        for arm in (one, other)
    }
    return [shares[one][seed] - shares[other][seed] for seed in sorted(shares[one])]


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

    def error(self, arm: Arm, k: int, seed: int, weights: Float[np.ndarray, " groups"]) -> float:
        """Weighted sum of squared errors of one training seed. FVU but for the total, which is the same for all."""
        return float(self.errors[str(arm), k][seed] @ weights)

    def above_front(
        self,
        arm: Arm,
        single: Sequence[Arm],
        budgets: Sequence[int],
        seed: int,
        weights: Float[np.ndarray, " groups"],
    ) -> float:
        """Largest, over `budgets`, of FVU(arm) / FVU(the best of the TopK arms `single` read at k) - 1."""
        ratios = []
        for k in budgets:
            best = min(self.error(each, k, seed, weights) for each in single)
            ratios.append(self.error(arm, k, seed, weights) / best - 1)
        return max(ratios)

    def least_loss(
        self, one: Arm, other: Arm, budgets: Sequence[int], seed: int, weights: Float[np.ndarray, " groups"]
    ) -> float:
        """Smallest, over `budgets`, of FVU(one) / FVU(other) - 1."""
        return min(self.error(one, k, seed, weights) / self.error(other, k, seed, weights) - 1 for k in budgets)


def plot_front(
    axis: Axes, fvu: pl.DataFrame, hierarchical: Arm, single: Sequence[Arm], untrained: Mapping[int, float]
) -> None:
    """FVU over k on log axes: every arm's curve, with a filled point where a TopK SAE stands at its own k."""
    for colour, arm in zip(COLOURS[1:], single, strict=False):
        rows = fvu.filter(pl.col("arm") == str(arm)).sort("k")
        axis.plot(rows["k"], rows["fvu"], color=colour, linewidth=1, alpha=0.6)
        own = rows.filter(pl.col("k") == arm.k).row(0, named=True)
        spread = [[own["fvu"] - own["low"]], [own["high"] - own["fvu"]]]
        axis.errorbar(
            arm.k, own["fvu"], yerr=spread, fmt="o", color=colour, label=f"TopK, trained at {arm.k}", zorder=3
        )
    rows = fvu.filter(pl.col("arm") == str(hierarchical)).sort("k")
    axis.plot(rows["k"], rows["fvu"], color=COLOURS[0], linewidth=2.2, label="HierarchicalTopK, one SAE", zorder=4)
    axis.fill_between(rows["k"], rows["low"], rows["high"], color=COLOURS[0], alpha=0.25)
    shown = sorted(untrained)
    axis.plot(shown, [untrained[k] for k in shown], ":", color=COLOURS[6], label="untrained SAE (control)")
    axis.axhline(1, color=COLOURS[6], linewidth=0.8)
    axis.set(xlabel="k, latents read per token", ylabel="FVU on held-out tokens", xscale="log", yscale="log")
    axis.set_xticks(shown, [str(k) for k in shown])
    axis.minorticks_off()
    axis.set_yticks([0.1, 0.2, 0.3, 0.5, 0.7, 1.0], ["0.1", "0.2", "0.3", "0.5", "0.7", "1 (mean)"])
    axis.set_ylim(0.9 * min(fvu["fvu"]), 1.1)
    axis.set_title("Reconstruction at every sparsity")
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def plot_ratios(axis: Axes, fvu: pl.DataFrame, hierarchical: Arm, single: Sequence[Arm], truncated: Arm) -> None:
    """FVU relative to HierarchicalTopK: the best TopK SAE at each trained k, and the largest one read below its own."""
    base = dict(fvu.filter(pl.col("arm") == str(hierarchical)).select("k", "fvu").iter_rows())
    best = [(k, min(_fvu(fvu, arm, k) for arm in single) / base[k]) for k in (arm.k for arm in single)]
    cut = [(k, _fvu(fvu, truncated, k) / base[k]) for k in sorted(base)]
    axis.axhline(1, color=COLOURS[0], linewidth=2.2, label="HierarchicalTopK, one SAE")
    axis.axhline(1 / 1.05, color=COLOURS[6], linewidth=0.8, linestyle="--", label="HierarchicalTopK 5 % above")
    axis.plot(*zip(*best, strict=True), "o", color=COLOURS[7], label="best TopK SAE at that k")
    axis.plot(*zip(*cut, strict=True), "s--", color=COLOURS[5], label=f"TopK trained at {truncated.k}, read at k")
    axis.set(xlabel="k, latents read per token", ylabel="FVU / FVU of HierarchicalTopK", xscale="log")
    axis.set_xticks(sorted(base), [str(k) for k in sorted(base)])
    axis.minorticks_off()
    axis.set_title("Below 1: better than the one SAE")
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _fvu(table: pl.DataFrame, arm: Arm, k: int) -> float:
    return table.filter((pl.col("arm") == str(arm)) & (pl.col("k") == k))["fvu"].item()


def _read(folder: Path, arms: Sequence[str], name: str) -> pl.DataFrame:
    for arm in arms:
        if not (folder / arm / name).is_file():
            raise InputError(f"{folder / arm} holds no {name}: run `dvc repro sae@{arm}`.")
    tables = [pl.read_parquet(folder / arm / name).select(pl.lit(arm).alias("arm"), pl.all()) for arm in arms]
    return pl.concat(tables)
