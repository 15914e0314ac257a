"""What `benchmarks/steering.py` writes: two CSVs, and from them the tables of README.md with what was aimed at."""

from pathlib import Path
from typing import Any

import polars as pl
from contenders import report

OURS = "Trimtab, vectors of all layers"
FULL = "Trimtab, full tuning"
RLOO = "TRL RLOO, biases"
GENERATE = "generate alone"
LAST = 5
"""Updates of a curve that its end is the mean of."""
HEAD = """\
| completions | contender | update, s (lowest to highest) | over ours | rollout, s | the rest, s | tokens each | peak, MiB | trained | gradients, KiB | optimiser, KiB |
|---|---|---|---|---|---|---|---|---|---|---|"""  # noqa: E501


def write(path: Path, measured: pl.DataFrame, *, curve: bool) -> None:
    """Replace rows of the devices measured in the CSV of times or of curves, and the part of the README from both."""
    of_curves = path.with_name(f"{path.stem}-curve.csv")
    devices = measured["device"].unique().to_list()
    report.merge(of_curves if curve else path, measured, pl.col("device").is_in(devices))
    if not path.exists():
        return
    learned = pl.read_csv(of_curves) if of_curves.exists() else None
    parts = [section(rows, learned) for _, rows in pl.read_csv(path).group_by("device", maintain_order=True)]
    report.rewrite(path.with_name("README.md"), "steering", parts)


def section(rows: pl.DataFrame, learned: pl.DataFrame | None) -> str:
    """One device's targets and tables, in Markdown."""
    first = rows.row(0, named=True)
    size = f"{first['prompts']} prompts x {first['group']} completions x {first['tokens']} new tokens"
    head = f"{report.measured_on(first)} {size}."
    lines = [head, "", *targets(rows), HEAD, *map(line, rows.iter_rows(named=True))]
    if learned is not None and len(here := learned.filter(pl.col("device") == first["device"])):
        lines += ["", *curve_table(here)]
    return "\n".join(lines)


def line(row: dict[str, Any]) -> str:
    """One contender in one regime."""
    trains = row["parameters"] is not None
    cells = [
        "all to the last token" if row["regime"] == "fixed" else "ending by themselves",
        row["contender"],
        f"{row['seconds']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
        f"{row['over_ours']:.2f}",
        f"{row['rollout_s']:.2f}",
        f"{row['update_s']:.2f}" if trains else "",
        f"{row['length']:.1f}",
        f"{row['peak_mib']:,.0f}",
        f"{row['parameters']:,}" if trains else "",
        f"{row['gradients'] / 1024:,.0f}" if trains else "",
        f"{row['optimiser'] / 1024:,.0f}" if trains else "",
    ]
    if row["device"] != "cpu":
        cells[2] += f", {row['rollouts_per_s']:.1f} rollouts/s"
        cells[4] += f" ({row['rollout_s'] / row['seconds']:.0%})"
    return f"| {' | '.join(map(str, cells))} |"


def targets(rows: pl.DataFrame) -> list[str]:
    """A table of what was set out to be reached on a CPU, and what was: computed from the rows."""
    if rows["device"][0] != "cpu":
        return []
    cells = {(row["regime"], row["contender"]): row for row in rows.iter_rows(named=True)}
    fixed, natural = (
        {name: row for (regime, name), row in cells.items() if regime == which} for which in ("fixed", "natural")
    )
    biases = [name for name in fixed if name.startswith("TRL") and "biases" in name]

    def with_model(row: dict[str, Any]) -> float:
        return row["model_mib"] + row["peak_mib"]

    whole = max(with_model(each[OURS]) / with_model(each[GENERATE]) for each in (fixed, natural))
    above = max(each[OURS]["peak_mib"] / each[GENERATE]["peak_mib"] for each in (fixed, natural))
    fewer = min(fixed[FULL][key] / fixed[OURS][key] for key in ("gradients", "optimiser"))
    found = [
        ("update of TRL's RLOO over ours, completions to the last token", fixed[RLOO]["over_ours"], ">=", 6.0),
        ("the same, completions ending by themselves", natural[RLOO]["over_ours"], ">=", 6.0),
        ("update of TRL's fastest with biases over ours, completions to the last token",
         min(fixed[name]["over_ours"] for name in biases), ">=", 6.0),
        ("the same, completions ending by themselves",
         min(natural[name]["over_ours"] for name in biases), ">=", 6.0),
        ("our update, s, completions to the last token", fixed[OURS]["seconds"], "<=", 5.0),
        ("the same, completions ending by themselves", natural[OURS]["seconds"], "<=", 5.0),
        ("peak of our update over that of `generate`, the weights counted, at worst", whole, "<=", 1.5),
        ("the same, the weights not counted", above, "<=", 1.5),
        ("full tuning's bytes of gradients and of optimiser state over ours, the lesser ratio", fewer, ">=", 1000.0),
    ]  # fmt: skip
    return report.targets(found)


def curve_table(learned: pl.DataFrame) -> list[str]:
    """Mean reward at the end of the curves, by contender."""
    updates, rate = learned["update"].max(), learned["rate"][0]
    ends = (
        learned.filter(pl.col("update") > updates - LAST)
        .group_by("contender", "seed", maintain_order=True)
        .agg(pl.col("reward").mean())
        .group_by("contender", maintain_order=True)
        .agg(pl.col("reward").mean().alias("mean"), pl.col("reward").alias("each"))
    )
    lines = [
        f"| {row['contender']} | {row['mean']:.3f} | {', '.join(f'{reward:.3f}' for reward in row['each'])} |"
        for row in ends.iter_rows(named=True)
    ]
    title = f"| learning rate {rate:g} | mean reward of the last {LAST} of {updates} updates | by seed |"
    return [title, "|---|---|---|", *lines]
