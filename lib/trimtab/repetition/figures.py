"""Figures of the comparison."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice, product

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from trimtab.plots import COLOURS
from trimtab.repetition.comparison import HUMAN, UNTRAINED, Grouped


def plot_repetition(axis: Axes, reading: Grouped, *, seed: int = 0) -> None:
    """Greedy seq-rep-4 of every arm, with intervals; human text is a dashed line."""
    arms = [arm for arm in reading.sums if arm != HUMAN]
    for place, arm in enumerate(arms):
        mean, low, high = reading.level(arm, seed=seed)
        colour = COLOURS[6] if arm == UNTRAINED or arm.endswith("shuffled") else COLOURS[0]
        error = [[mean - max(0.0, low)], [min(1.0, high) - mean]] if np.isfinite([low, high]).all() else None
        axis.barh(place, mean, xerr=error, color=colour, height=0.6, error_kw={"linewidth": 1})
        seeds = [reading.mean(arm, s) for s in range(reading.seeds)]
        axis.plot(seeds, [place] * len(seeds), "|", color="black", markersize=9)
    axis.axvline(reading.mean(HUMAN), color=COLOURS[5], linestyle="--", label="human continuations")
    axis.set_yticks(range(len(arms)), arms)
    axis.invert_yaxis()
    axis.set(xlabel="greedy seq-rep-4 (lower: less repetition)", xlim=(0, None))
    axis.set_title("Repetition on held-out prefixes (marks: seeds)")
    axis.legend(fontsize=8, loc="lower right")


def plot_trade(axis: Axes, reading: Grouped, nats: Grouped, *, seed: int = 0) -> None:
    """What each arm's repetition costs in perplexity."""
    arms = [arm for arm in nats.sums if arm != UNTRAINED]
    for (marker, colour), arm in zip(_styles("o^D"), arms, strict=False):
        cost, low, high = nats.relative(arm, UNTRAINED, seed=seed)
        error = [[cost - low], [high - cost]] if np.isfinite([low, high]).all() else None
        scaled = None if error is None else [[100 * e for e in side] for side in error]
        axis.errorbar(100 * cost, reading.mean(arm), xerr=scaled, fmt=marker, color=colour, label=arm, markersize=5)
    axis.plot(0, reading.mean(UNTRAINED), "s", color=COLOURS[6], label=UNTRAINED)
    axis.axhline(reading.mean(HUMAN), color=COLOURS[5], linestyle="--", linewidth=1)
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel="change of held-out perplexity, % (dotted: 1 %)", ylabel="greedy seq-rep-4", ylim=(0, None))
    axis.set_title("Repetition against perplexity")
    axis.legend(fontsize=7.5, loc="lower left")


def plot_decoders(axis: Axes, readings: Mapping[str, Grouped], arms: Sequence[str]) -> None:
    """seq-rep-4 by decoder, a bar for each arm, ranges over seeds; the human row is a dashed line."""
    shown = [name for name, reading in readings.items() if all(arm in reading.sums for arm in arms)]
    width = 0.8 / len(arms)
    for i, (arm, (_, colour)) in enumerate(
        zip(arms, [("", COLOURS[6]), *islice(_styles("o"), len(arms))], strict=False)
    ):
        places = np.arange(len(shown)) + (i - (len(arms) - 1) / 2) * width
        # Some decoders were read with the first seed alone.
        seeds = [[readings[name].mean(arm, s) for s in range(readings[name].seeds)] for name in shown]
        means = [float(np.mean(each)) for each in seeds]
        below, above = ([abs(end(each) - m) for each, m in zip(seeds, means, strict=True)] for end in (min, max))
        axis.bar(places, means, width, yerr=[below, above], color=colour, label=arm, error_kw={"linewidth": 1})
    axis.axhline(readings[shown[0]].mean(HUMAN), color=COLOURS[5], linestyle="--", linewidth=1, label=HUMAN)
    axis.set_xticks(range(len(shown)), shown, rotation=30, ha="right", fontsize=8)
    axis.set(ylabel="seq-rep-4")
    axis.set_title("By decoder (bars: range over seeds)")
    axis.legend(fontsize=8)


def plot_sentences(axis: Axes, sentences: pl.DataFrame) -> None:
    """Probability of a sentence's tokens against how often it has stood before."""
    styles = [("o", COLOURS[6]), *islice(_styles("o^D"), sentences["arm"].n_unique())]
    for (marker, colour), ((arm,), rows) in zip(styles, sentences.group_by("arm", maintain_order=True), strict=False):
        mean = rows.group_by("repeat", maintain_order=True).agg(pl.col("probability").mean()).sort("repeat")
        axis.plot(
            mean["repeat"] - 1, mean["probability"], f"{marker}-", color=colour, label=arm, markersize=3, linewidth=1.3
        )
    axis.set(xlabel="times that the sentence has stood before", ylabel="probability of its tokens", ylim=(0, 1))
    axis.set_title("Self-reinforcement")
    axis.legend(fontsize=8)


def plot_training(axes: Sequence[Axes], history: pl.DataFrame, validations: pl.DataFrame) -> None:
    """Reward of rollouts, share of masked tokens, and validation perplexity over updates, a line a seed."""
    for axis, column, label in ((axes[0], "reward", "mean reward"), (axes[1], "masked", "share of tokens repeated")):
        for (seed,), rows in history.filter(pl.col(column).is_not_null()).group_by("seed", maintain_order=True):
            axis.plot(rows["update"], rows[column], "o-", markersize=3, linewidth=1.0, label=f"seed {seed}")
        axis.set(xlabel="update", ylabel=f"{label}, rollouts", ylim=(0, 1))
    for (seed,), rows in validations.group_by("seed", maintain_order=True):
        axes[2].plot(rows["update"], rows["perplexity"], "o-", markersize=3, linewidth=1.0, label=f"seed {seed}")
    axes[2].set(xlabel="update", ylabel="validation perplexity")
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[2].legend(fontsize=8)


def plot_lengths(axes: Sequence[Axes], lengths: Mapping[str, Sequence[int]]) -> None:
    """Longest repeated stretch of each text, a histogram an axis."""
    longest = max(max(each) for each in lengths.values())
    for axis, (decoder, each) in zip(axes, lengths.items(), strict=True):
        axis.hist(each, bins=np.linspace(0, max(1, longest), 21).tolist(), color=COLOURS[0])
        axis.set(xlabel="tokens of the longest repeated stretch", ylabel="continuations")
        axis.set_title(decoder)


def _styles(markers: str) -> Iterator[tuple[str, str]]:
    """(marker, colour), none twice before all were there."""
    return cycle(product(markers, COLOURS[:6]))
