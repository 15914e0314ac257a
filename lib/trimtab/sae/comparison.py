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
    """Squared errors by arm and k as dense arrays, so that a resample is one weighted sum."""

    errors: Mapping[tuple[str, int], Float[np.ndarray, "seeds documents"]]
    totals: Float[np.ndarray, " documents"]

    @classmethod
    def of(cls, errors: pl.DataFrame) -> "ErrorTensor":
        """From the long table of `read_errors`; every arm must have the same seeds and documents."""
        arrays = {}
        ordered = errors.sort("seed", "document")
        totals = ordered.unique("document", maintain_order=True).sort("document")["total"].to_numpy()
        for (arm, k), rows in ordered.group_by("arm", "k"):
            grid = rows.pivot("document", index="seed", values="error", sort_columns=False).drop("seed").to_numpy()
            if grid.shape[1] != len(totals) or np.isnan(grid).any():
                raise InputError(
                    f"{arm} at k={k} was not read on the same documents as the others: run `dvc repro sae`."
                )
            arrays[str(arm), int(str(k))] = grid
        return cls(arrays, totals)

    @property
    def seeds(self) -> int:
        """Number of training seeds."""
        return len(next(iter(self.errors.values())))

    @property
    def documents(self) -> int:
        """Number of held-out documents."""
        return len(self.totals)

    def ratio(self, one: Arm, other: Arm, k: int, weights: Float[np.ndarray, "seeds documents"]) -> float:
        """FVU(one, k) / FVU(other, k) - 1 with every (seed, document) pair weighted. The totals cancel."""
        above, below = self.errors[str(one), k], self.errors[str(other), k]
        return float((above * weights).sum() / (below * weights).sum()) - 1


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
    axis.set_ylim(0.9 * min(fvu["fvu"]), 1.6)
    axis.set_title("Reconstruction at every sparsity")
    axis.legend(fontsize=8)


def plot_ratios(axis: Axes, fvu: pl.DataFrame, hierarchical: Arm, single: Sequence[Arm], truncated: Arm) -> None:
    """FVU relative to HierarchicalTopK: TopK SAEs at their own k, and the largest one read below it."""
    base = dict(fvu.filter(pl.col("arm") == str(hierarchical)).select("k", "fvu").iter_rows())
    own = [(arm.k, _fvu(fvu, arm, arm.k) / base[arm.k]) for arm in single]
    cut = [(k, _fvu(fvu, truncated, k) / base[k]) for k in sorted(base)]
    axis.axhline(1, color=COLOURS[0], linewidth=2.2, label="HierarchicalTopK, one SAE")
    axis.plot(*zip(*own, strict=True), "o", color=COLOURS[7], label="TopK at the k it was trained for")
    axis.plot(*zip(*cut, strict=True), "s--", color=COLOURS[5], label=f"TopK trained at {truncated.k}, read at k")
    axis.set(xlabel="k, latents read per token", ylabel="FVU / FVU of HierarchicalTopK", xscale="log")
    axis.set_xticks(sorted(base), [str(k) for k in sorted(base)])
    axis.minorticks_off()
    axis.set_title("Below 1: better than the one SAE")
    axis.legend(fontsize=8)


def _fvu(table: pl.DataFrame, arm: Arm, k: int) -> float:
    return table.filter((pl.col("arm") == str(arm)) & (pl.col("k") == k))["fvu"].item()


def _read(folder: Path, arms: Sequence[str], name: str) -> pl.DataFrame:
    for arm in arms:
        if not (folder / arm / name).is_file():
            raise InputError(f"{folder / arm} holds no {name}: run `dvc repro sae@{arm}`.")
    tables = [pl.read_parquet(folder / arm / name).select(pl.lit(arm).alias("arm"), pl.all()) for arm in arms]
    return pl.concat(tables)
