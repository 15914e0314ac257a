"""What `benchmarks/repetition.py` writes: a CSV, and from it the table of README.md with what was aimed at."""

from pathlib import Path
from typing import Any

import polars as pl
from contenders import report

TITLES = {"policy": "policy gradient", "unlikelihood": "unlikelihood"}
"""Kinds of update by what they are called."""
OURS = {kind: f"Trimtab {title}" for kind, title in TITLES.items()}
BOTH = "Trimtab both"
PUBLISHED = {kind: f"published shape, {title}" for kind, title in TITLES.items()}
PUBLISHED_BF16 = {kind: f"{name}, bf16" for kind, name in PUBLISHED.items()}
TRL = "TRL GRPO, repetition reward"
HEAD = """\
| contender | update, s (lowest to highest) | over ours | rollout, s | tokens/s | the rest, s | tokens/s | mean reward | peak, MiB |
|---|---|---|---|---|---|---|---|---|"""  # noqa: E501


def write(path: Path, measured: pl.DataFrame) -> None:
    """Replace rows of the devices measured in the CSV, and the part of the README from it."""
    devices = measured["device"].unique().to_list()
    table = report.merge(path, measured, pl.col("device").is_in(devices))
    parts = [section(rows) for _, rows in table.group_by("device", maintain_order=True)]
    report.rewrite(path.with_name("README.md"), "repetition", parts)


def section(rows: pl.DataFrame) -> str:
    """One device's targets and table, in Markdown."""
    first = rows.row(0, named=True)
    size = f"{first['prefixes']} prefixes of {first['prefix_tokens']} tokens, {first['tokens']} new tokens each"
    head = f"{report.measured_on(first)} {size}; {first['rounds']} rounds."
    return "\n".join([head, "", *targets(rows), HEAD, *map(line, rows.iter_rows(named=True))])


def line(row: dict[str, Any]) -> str:
    """One contender."""
    cells = [
        row["contender"],
        f"{row['seconds']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
        f"{row['over_ours']:.2f}",
        f"{row['rollout_s']:.2f}",
        f"{row['rollout_tokens_per_s']:,.0f}",
        f"{row['update_s']:.2f}",
        f"{row['update_tokens_per_s']:,.0f}",
        f"{row['reward']:.3f}",
        f"{row['peak_mib']:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def targets(rows: pl.DataFrame) -> list[str]:
    """A table of what was set out to be reached and what was, from the rows of those that are there."""
    cells = {row["contender"]: row for row in rows.iter_rows(named=True)}
    times = [
        (f"published shape over ours, {TITLES[kind]}{precision}", names[kind])
        for kind in TITLES
        for precision, names in ((", as published in fp32", PUBLISHED), (", both in bf16", PUBLISHED_BF16))
    ]
    times.append(("TRL over ours", TRL))
    found = [(what, cells[peer]["over_ours"], ">=", 3.0) for what, peer in times if peer in cells]
    for kind, ours in OURS.items():
        for peer, row in cells.items():
            if row["kind"] == kind and peer not in (ours, BOTH):
                ratio = cells[ours]["peak_mib"] / row["peak_mib"]
                found.append((f"peak of ours over that of {peer}", ratio, "<", 1.0))
    return report.targets(found)
