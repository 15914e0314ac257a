"""What `benchmarks/sae.py` writes: the CSV, and from it the table of README.md and whether each target is met."""

from pathlib import Path
from typing import Any

import polars as pl
from contenders import report

PEERS = ("sae-lens", "dictionary-learning", "eai-sparsify")
ARMS = {
    "TopK": "Trimtab TopK",
    "J = powers of two": "Trimtab HierarchicalTopK, J = powers of two",
    "J = 1..K": "Trimtab HierarchicalTopK, J = 1..K",
}
HEAD = """\
| K | precision | contender | step, ms (lowest to highest) | tokens/s | over our TopK | decoder loss, ms | peak, MiB | FVU |
|---|---|---|---|---|---|---|---|---|"""  # noqa: E501


def write(path: Path, measured: pl.DataFrame, devices: list[str]) -> None:
    """Replace the rows of these devices in the CSV, and the part of the README beside it between the markers."""
    table = report.merge(path, measured, pl.col("device").is_in(devices))
    parts = [section(rows) for _, rows in table.group_by("device", maintain_order=True)]
    report.rewrite(path.with_name("README.md"), "sae", parts)


def section(rows: pl.DataFrame) -> str:
    """One device's targets and table, in Markdown."""
    first = rows.row(0, named=True)
    size = f"d = {first['d_model']}, {first['latents']:,} latents, {first['batch']:,} rows to a step"
    head = f"{report.measured_on(first)} {size}: {first['data']}."
    ordered = rows.sort("precision", "k", descending=[True, False], maintain_order=True)
    return "\n".join([head, "", *targets(rows), HEAD, *map(line, ordered.iter_rows(named=True))])


def line(row: dict[str, Any]) -> str:
    """One contender at one shape."""
    cells = [
        row["k"],
        row["precision"],
        row["contender"],
        f"{row['step_ms']:,.0f} ({row['step_low']:,.0f} to {row['step_high']:,.0f})",
        f"{row['tokens_per_s']:,}",
        f"{row['step_over_ours']:.2f}",
        f"{row['decoder_ms']:,.1f}",
        f"{row['peak_mib']:,.0f}",
        "" if row.get("fvu") is None else f"{row['fvu']:.3f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def targets(rows: pl.DataFrame) -> list[str]:
    """A table of what was set out to be reached on a CPU, and what was: computed from the rows."""
    if rows["device"][0] != "cpu":
        return []
    fp32 = rows.filter(pl.col("precision") == "fp32")
    cells = {(row["contender"], row["k"]): row for row in fp32.iter_rows(named=True)}
    budgets = sorted({k for _, k in cells})
    over = {name: cells[name, 32]["step_over_ours"] for name in PEERS}
    worst = {arm: max(cells[name, k]["step_over_ours"] for k in budgets) for arm, name in ARMS.items()}
    ours = {k: cells[ARMS["TopK"], k] for k in budgets}
    memory = max(ours[k]["peak_mib"] / min(cells[peer, k]["peak_mib"] for peer in PEERS) for k in budgets)
    fvu = ours[32]["fvu"] / min(cells[peer, 32]["fvu"] for peer in PEERS)
    found = [
        ("step of the fastest other library over our TopK's, K = 32", min(over.values()), ">=", 1.6),
        ("step of dictionary-learning over it, K = 32", over["dictionary-learning"], ">=", 3.5),
        ("step of sae-lens over it, K = 32", over["sae-lens"], ">=", 3.5),
        ("J = powers of two over TopK, K = 32", cells[ARMS["J = powers of two"], 32]["step_over_ours"], "<=", 1.25),
        ("J = 1..K over TopK, K = 32", cells[ARMS["J = 1..K"], 32]["step_over_ours"], "<=", 1.5),
        ("J = powers of two over TopK, at the worst K", worst["J = powers of two"], "<=", 1.25),
        ("J = 1..K over TopK, at the worst K", worst["J = 1..K"], "<=", 1.5),
        ("peak memory of TopK over the least of another library, at the worst K", memory, "<", 1.0),
        ("held-out FVU of TopK over the best of another library", fvu, "<=", 1.0),
    ]
    return report.targets(found)
