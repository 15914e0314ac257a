"""Figures of the comparison: FVU over k, and over the one SAE's."""

from collections.abc import Mapping

import polars as pl
from matplotlib.axes import Axes

from trimtab.plots import COLOURS
from trimtab.sae.comparison import Sides, fvu_of

LABELS = {
    "hierarchical-pow2": "Hierarchical, J = powers of two, alike",
    "hierarchical-pow2gap": "... weighted by their gaps",
    "multitopk": "Multi-TopK (k/4 and k)",
    "batchtopk": "BatchTopK",
    "matryoshka": "Matryoshka (nested dictionaries)",
    "jumprelu": "JumpReLU",
}
"""Names of the further baselines in figures."""


def plot_front(axis: Axes, fvu: pl.DataFrame, sides: Sides, floors: Mapping[str, Mapping[int, float]]) -> None:
    """FVU over k on log axes: every TopK arm's curve, with a filled point where it stands at its own k; the one SAE as
    a band over seeds; `floors` are dotted baselines by name."""
    for colour, arm in zip(COLOURS[1:], sides.single, strict=False):
        rows = fvu.filter(pl.col("arm") == str(arm)).sort("k")
        axis.plot(rows["k"], rows["fvu"], color=colour, linewidth=1, alpha=0.6)
        own = rows.filter(pl.col("k") == arm.k).row(0, named=True)
        spread = [[own["fvu"] - own["low"]], [own["high"] - own["fvu"]]]
        axis.errorbar(
            arm.k, own["fvu"], yerr=spread, fmt="o", color=colour, label=f"TopK, trained at {arm.k}", zorder=3
        )
    rows = fvu.filter(pl.col("arm") == str(sides.hierarchical)).sort("k")
    axis.plot(rows["k"], rows["fvu"], color=COLOURS[0], linewidth=2.2, label="HierarchicalTopK, one SAE", zorder=4)
    axis.fill_between(rows["k"], rows["low"], rows["high"], color=COLOURS[0], alpha=0.25)
    shown = rows["k"].to_list()
    for style, (name, floor) in zip((":", "-.", "--"), floors.items(), strict=False):
        axis.plot(shown, [floor[k] for k in shown], style, color=COLOURS[6], linewidth=1, label=name)
    axis.axhline(1, color=COLOURS[6], linewidth=0.8)
    _finish(axis, shown, "FVU on held-out tokens", "Reconstruction at every sparsity", yscale="log")
    axis.set_yticks([0.1, 0.2, 0.3, 0.5, 0.7, 1.0], ["0.1", "0.2", "0.3", "0.5", "0.7", "1 (mean)"])
    axis.set_ylim(0.9 * min(fvu["fvu"]), 1.1)


def plot_ratios(axis: Axes, fvu: pl.DataFrame, sides: Sides) -> None:
    """FVU over HierarchicalTopK's: TopK at its own k, the largest TopK below its own, and the other baselines."""
    base = dict(fvu.filter(pl.col("arm") == str(sides.hierarchical)).select("k", "fvu").iter_rows())
    budgets = sorted(base)
    axis.axhline(1, color=COLOURS[0], linewidth=2.2, label="HierarchicalTopK, one SAE")
    axis.axhline(1 / 1.02, color=COLOURS[6], linewidth=0.8, linestyle="--", label="HierarchicalTopK 2 % above")
    own = [(arm.k, fvu_of(fvu, arm, arm.k) / base[arm.k]) for arm in sides.single]
    axis.plot(*zip(*own, strict=True), "o", color=COLOURS[7], label="TopK trained for that k", zorder=4)
    cut = [(k, fvu_of(fvu, sides.truncated, k) / base[k]) for k in budgets]
    axis.plot(*zip(*cut, strict=True), "s--", color=COLOURS[5], label=f"TopK trained at {sides.truncated.k}, read at k")
    for colour, arm in zip(COLOURS[1:], sides.others, strict=False):
        line = [(k, fvu_of(fvu, arm, k) / base[k]) for k in budgets]
        axis.plot(*zip(*line, strict=True), ".-", color=colour, linewidth=1, label=LABELS.get(arm.kind, arm.kind))
    _finish(axis, budgets, "FVU / FVU of HierarchicalTopK", "Below 1: better than the one SAE")


def _finish(axis: Axes, budgets: list[int], ylabel: str, title: str, **scales: str) -> None:
    axis.set(xlabel="k, latents read per token", ylabel=ylabel, xscale="log", **scales)
    labelled = [k for k in budgets if k & (k - 1) == 0]
    axis.set_xticks(labelled, [str(k) for k in labelled])
    axis.minorticks_off()
    axis.set_title(title)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
