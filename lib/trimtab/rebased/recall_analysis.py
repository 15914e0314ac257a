"""What the grid of recall runs says, and what a trained mixer looks at."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from trimtab.claims import over_seeds
from trimtab.errors import InputError
from trimtab.plots import COLOURS
from trimtab.rebased.mixers import PolynomialAttention
from trimtab.rebased.model import LanguageModel
from trimtab.rebased.mqar import IGNORED, Recall
from trimtab.rebased.mqar_training import VARIED, Job, MQARConfig

TOOK_OFF = 2.0
"""Accuracy, in units of guessing among the values of the row, from which a run has left that plateau."""
LEARNS = 0.2
"""Mean validation accuracy from which a cell counts as learnt."""
CELL = ["arm", "time", "pairs", "d_model", "width"]
"""What one accuracy is of, beside its seed."""


def table_of(runs: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """A row for each run: columns `CELL`, `learning_rate`, `seed`, `valid` (the last validation's accuracy), `accuracy`
    (on the test rows), `state`, `per_pair` (numbers of state for each pair)."""
    rows = [{**run, "valid": run["history"][-1]["accuracy"]} for run in runs]
    return pl.DataFrame(rows).drop("history").with_columns((pl.col("state") / pl.col("pairs")).alias("per_pair"))


def chosen(runs: pl.DataFrame) -> pl.DataFrame:
    """The runs of each cell at its best rate: that of the highest mean validation accuracy over seeds, the lowest of
    equals."""
    rates = runs.group_by(*CELL, "learning_rate", maintain_order=True).agg(pl.col("valid").mean())
    best = rates.sort("valid", "learning_rate", descending=[True, False]).group_by(CELL, maintain_order=True).first()
    kept = runs.join(best.select(*CELL, "learning_rate"), on=[*CELL, "learning_rate"], maintain_order="left")
    return kept.sort(*CELL, "seed", maintain_order=True)


def summary(runs: pl.DataFrame) -> pl.DataFrame:
    """A row for each cell at its best rate: mean, least and greatest accuracy over seeds, the share of seeds that left
    the plateau, and the state carried."""
    return (
        chosen(runs)
        .group_by(CELL, maintain_order=True)
        .agg(
            pl.col("learning_rate", "state", "per_pair").first(),
            pl.col("accuracy").mean(),
            pl.col("accuracy").min().alias("least"),
            pl.col("accuracy").max().alias("greatest"),
            (pl.col("accuracy") >= TOOK_OFF / pl.col("pairs")).mean().alias("took_off"),
        )
    )


def readable(table: pl.DataFrame) -> pl.DataFrame:
    """Without the columns of the cell that are the same throughout."""
    return table.drop(column for column in CELL if column != "arm" and table[column].n_unique() == 1)


def tightest(runs: pl.DataFrame, *, roomiest: bool = False) -> dict[str, int]:
    """The task, width of the model and d_k at which ReBased has the least (or the most) state for each pair, among the
    cells that are `learnt`; where none is, among all. Raises InputError where ReBased was not run."""
    cells = chosen(runs).filter(pl.col("arm") == "rebased").sort("per_pair", descending=roomiest)
    rows = cells.select(CELL[1:]).unique(maintain_order=True).to_dicts()
    if not rows:
        raise InputError("mqar: arms must hold rebased, which the claims are about.")
    return next((row for row in rows if learnt(runs, row)), rows[0])


def learnt(runs: pl.DataFrame, cell: Mapping[str, int]) -> bool:
    """Whether ReBased or Based learns the task there: mean validation accuracy of at least `LEARNS` at its best rate.
    Where neither does there is nothing to compare: all differences are noise about 0."""
    here = chosen(runs).filter([pl.col(key) == value for key, value in cell.items()], pl.col("arm").is_in(VARIED))
    means = here.group_by("arm").agg(pl.col("valid").mean())["valid"]
    return bool((means >= LEARNS).any())


def interval(
    runs: pl.DataFrame, cell: Mapping[str, int], values: Float[np.ndarray, " seeds"]
) -> tuple[float, float, float]:
    """`claims.over_seeds` of values that compare arms in a cell; unbounded where it is not `learnt`."""
    effect, low, high = over_seeds(values.tolist())
    return (effect, low, high) if learnt(runs, cell) else (effect, -np.inf, np.inf)


def accuracies(runs: pl.DataFrame, arm: str, cell: Mapping[str, int]) -> Float[np.ndarray, " seeds"]:
    """Of an arm's seeds in a cell, at its best rate; an arm without a width has one for all. Raises InputError where
    the cell was not run."""
    of_arm = chosen(runs).filter(pl.col("arm") == arm)
    keys = CELL[1:] if arm in VARIED else CELL[1:-1]
    found = of_arm.filter([pl.col(key) == cell[key] for key in keys])["accuracy"].to_numpy()
    if not len(found):
        raise InputError(f"mqar: {arm} was not run at {dict(cell)}: add it to arms.")
    return found


def plot_accuracy(axis: Axes, runs: pl.DataFrame) -> None:
    """Accuracy against numbers of state for each pair, a point a seed at the best rate; without a state a line."""
    best = chosen(runs)
    for colour, arm in zip(COLOURS, best["arm"].unique(maintain_order=True), strict=False):
        rows = best.filter(pl.col("arm") == arm)
        if not (rows["state"] > 0).any():
            mean = float(rows["accuracy"].to_numpy().mean())
            axis.axhline(mean, color=colour, linestyle="--", linewidth=1.2, label=arm)
            continue
        means = rows.group_by("per_pair", maintain_order=True).agg(pl.col("accuracy").mean()).sort("per_pair")
        axis.plot(means["per_pair"], means["accuracy"], color=colour, linewidth=1.4, label=arm)
        axis.scatter(rows["per_pair"], rows["accuracy"], color=colour, s=16, zorder=3)
    axis.set(xlabel="numbers of state for each pair", ylabel="accuracy on held-out rows", ylim=(0, 1.02), xscale="log")
    states = best.filter(pl.col("state") > 0)["per_pair"].unique().sort().to_list()
    axis.set_xticks(states, [f"{state:.0f}" for state in states])
    axis.minorticks_off()
    axis.set_title("Recall against state")
    axis.legend(fontsize=8)


def plot_curves(axis: Axes, runs: pl.DataFrame, histories: Sequence[dict[str, Any]], cell: Mapping[str, int]) -> None:
    """Validation accuracy along the runs of a task and width, each arm's at its best rate, a thin line a seed."""
    best = chosen(runs).filter(
        [pl.col(key) == cell[key] for key in CELL[1:-1]],
        (pl.col("width") == cell["width"]) | ~pl.col("arm").is_in(VARIED),
    )
    kept = set(best.select(*CELL, "learning_rate", "seed").iter_rows())
    arms = chosen(runs)["arm"].unique(maintain_order=True).to_list()
    for run in histories:
        if tuple(run[key] for key in (*CELL, "learning_rate", "seed")) in kept:
            curve = pl.DataFrame(run["history"])
            colour = COLOURS[arms.index(run["arm"]) % len(COLOURS)]
            axis.plot(curve["step"], curve["accuracy"], color=colour, linewidth=0.9, alpha=0.8)
    axis.set(xlabel="step", ylabel="accuracy on validation rows", ylim=(0, 1.02))
    axis.set_title(f"{cell['pairs']} pairs, d_k = {cell['width']}")


def fresh(mixer: PolynomialAttention, arm: str = "rebased") -> PolynomialAttention:
    """The same attention as it starts, or another arm's."""
    width = mixer.q.in_features
    return PolynomialAttention(width, mixer.heads, mixer.d_k, mixer.d_v, arm)


def plot_shapes(axis: Axes, mixers: dict[str, PolynomialAttention]) -> None:
    """`kernel_shape` of each, with quartiles."""
    for colour, (name, mixer) in zip(COLOURS, mixers.items(), strict=False):
        table = kernel_shape(mixer)
        axis.plot(table["cosine"], table["median"], color=colour, label=name)
        axis.fill_between(table["cosine"], table["low"], table["high"], color=colour, alpha=0.15)
    axis.set(xlabel="cosine of query and key", ylabel="weight, over that at cosine 1", ylim=(0, None))
    axis.legend(fontsize=8)


def plot_map(axis: Axes, attention: Float[Tensor, "time time"], rows: Recall, row: int = 0) -> None:
    """Where the queries of one row look: a line for each query, a ring where its answer stands."""
    asked = (rows.labels[row] != IGNORED).nonzero()[:, 0].tolist()
    told = 2 * len(asked)
    axis.imshow(attention[asked][:, :told], cmap="Blues", aspect="auto", vmin=0)
    for i, time in enumerate(asked):
        answer = int((rows.inputs[row] == rows.labels[row, time]).nonzero()[0])
        axis.plot(answer, i, "o", markerfacecolor="none", markeredgecolor=COLOURS[5], markersize=7)
    axis.set(xlabel="token looked at (keys even, values odd)", ylabel="query")
    axis.grid(visible=False)


def last_polynomial(model: LanguageModel) -> PolynomialAttention:
    """The last polynomial attention of a model. Raises InputError where it has none."""
    mixers = [module for module in model.modules() if isinstance(module, PolynomialAttention)]
    if not mixers:
        raise InputError("The model has no polynomial attention to look at.")
    return mixers[-1]


@torch.no_grad()
def attention_map(model: LanguageModel, rows: Recall) -> Float[Tensor, "rows heads time time"]:
    """Weights of the last polynomial attention, each query's divided by their sum."""
    mixer, seen = last_polynomial(model), []
    handle = mixer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        model.hidden(rows.inputs.to(model.embedding.weight.device))
    finally:
        handle.remove()
    q = mixer.mapped(mixer.q(seen[0]), mixer.gamma_q, mixer.beta_q)
    k = mixer.mapped(mixer.k(seen[0]), mixer.gamma_k, mixer.beta_k)
    weights = mixer.polynomial(torch.einsum("bihd,bjhd->bhij", q, k) * mixer.d_k**-0.5).tril()
    return (weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-12)).cpu()


def untrained_map(config: MQARConfig, job: Job, rows: Recall) -> Float[Tensor, "rows heads time time"]:
    """`attention_map` of the job's model as it starts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        return attention_map(LanguageModel(config.model(job)), rows)


def maps(mixer: PolynomialAttention) -> pl.DataFrame:
    """What the affine maps of queries and keys became: least, mean, greatest and spread of gamma (from 1) and of beta
    (from 0) over channels."""
    rows = []
    for name in ("gamma_q", "beta_q", "gamma_k", "beta_k"):
        values = getattr(mixer, name)
        if values is not None:
            numbers = values.detach().float().cpu()
            rows.append((name, *(float(f()) for f in (numbers.min, numbers.mean, numbers.max, numbers.std))))
    return pl.DataFrame(rows, schema=["parameter", "least", "mean", "greatest", "deviation"], orient="row")


def overlap(attention: Float[Tensor, "rows heads time time"], rows: Recall) -> float:
    """Intersection over union of where queries look and where their answer stands, mean over queries: a query looks
    where its weight, in any head, is at least half of its greatest; the answer stands at the value's place."""
    found = []
    for row, time in (rows.labels != IGNORED).nonzero().tolist():
        weights = attention[row, :, time].amax(dim=0)
        looked = weights >= weights.max() / 2
        answer = int((rows.inputs[row] == rows.labels[row, time]).nonzero()[0])
        found.append(float(looked[answer]) / float(looked.sum() + (not looked[answer])))
    return float(np.mean(found))


@torch.no_grad()
def kernel_shape(mixer: PolynomialAttention, draws: int = 2000, *, seed: int = 0) -> pl.DataFrame:
    """How a token's weight depends on the cosine of raw query and key: columns `cosine`, `median`, `low`, `high`
    (quartiles over random directions of all heads), each divided by the median at cosine 1.

    Raw queries and keys have norm sqrt(d_k), as after a norm; the learnt map, where there is one, is applied.
    """
    generator, width = torch.Generator().manual_seed(seed), mixer.heads * mixer.d_k
    scale = mixer.d_k**0.5

    def directions() -> Tensor:
        drawn = torch.randn(draws, mixer.heads, mixer.d_k, generator=generator)
        return F.normalize(drawn, dim=-1)

    first, rows = directions(), []
    second = directions()
    second = F.normalize(second - (second * first).sum(-1, keepdim=True) * first, dim=-1)  # at right angles
    learnt_maps = ((mixer.gamma_q, mixer.beta_q), (mixer.gamma_k, mixer.beta_k))
    gammas = [tuple(None if x is None else x.detach().cpu() for x in each) for each in learnt_maps]
    for cosine in torch.linspace(-1, 1, 41).tolist():
        raw = (scale * first, scale * (cosine * first + (1 - cosine**2) ** 0.5 * second))
        q, k = (
            (x.reshape(draws, width) * (1 if g is None else g) + (0 if b is None else b)).view_as(x)
            for x, (g, b) in zip(raw, gammas, strict=True)
        )
        weights = mixer.polynomial((q * k).sum(-1) * mixer.d_k**-0.5).flatten()
        rows.append((cosine, *weights.quantile(torch.tensor([0.5, 0.25, 0.75])).tolist()))
    table = pl.DataFrame(rows, schema=["cosine", "median", "low", "high"], orient="row")
    return table.with_columns(pl.col("median", "low", "high") / table["median"][-1])
