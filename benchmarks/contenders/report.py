"""What the benchmarks' reports share: what was measured with, rows replaced in a CSV, a part of README.md rewritten, a
table of targets."""

import datetime
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch

from trimtab.pipeline.provenance import hardware
from trimtab.pipeline.provenance import versions as installed

MEETS = {">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b, "<": lambda a, b: a < b}


def merge(path: Path, measured: pl.DataFrame, replaced: pl.Expr) -> pl.DataFrame:
    """Write the CSV anew: what was measured, then those of its former rows that are not `replaced`."""
    table = measured
    if path.exists():
        table = pl.concat([measured, pl.read_csv(path).filter(~replaced)], how="diagonal_relaxed")
    table.write_csv(path)
    return table


def rewrite(readme: Path, name: str, parts: Sequence[str]) -> None:
    """Replace what stands between the markers of that name; a folder without a README has none to change."""
    if readme.exists():
        before, begin, rest = readme.read_text(encoding="utf-8").partition(f"<!-- {name}: begin -->\n")
        _, end, after = rest.partition(f"<!-- {name}: end -->")
        readme.write_text(before + begin + "\n\n".join(parts) + "\n" + end + after, encoding="utf-8")


def measured_on(row: Mapping[str, Any]) -> str:
    """How a section begins: what the rows of a device were measured with."""
    where = row["hardware"] + (f", {row['threads']} threads" if row["device"] == "cpu" else "")
    return f"**{where}**, {row['date']}. {row['versions']}."


def targets(found: Sequence[tuple[str, float, str, float]]) -> list[str]:
    """Lines of a table of what was set out to be reached, (what, found, sign, wanted) each, and whether it was."""
    lines = [
        f"| {what} | {value:.2f} | {sign} {bar} | {'yes' if MEETS[sign](value, bar) else '**no**'} |"
        for what, value, sign, bar in found
    ]
    return ["| target | found | wanted | met |", "|---|---|---|---|", *lines, ""]


def versions(*peers: str) -> str:
    """torch, which is the same for all, and libraries that `peers.txt` pins."""
    text = (Path(__file__).parents[1] / "peers.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^(\S+)==(\S+)$", text, flags=re.MULTILINE))
    return ", ".join([f"torch {torch.__version__}", *(f"{name} {pins[name]}" for name in peers)])


def stamp(threads: int, *, peers: Sequence[str], own: Sequence[str]) -> dict[str, Any]:
    """Columns of a row that say what it was measured with: the date, the machine, and versions of libraries, those that
    `peers.txt` pins and those of this environment."""
    known = installed()
    named = versions(*peers) + "".join(f", {name} {known[name]}" for name in own)
    today = datetime.date.today().isoformat()
    return {"date": today, "hardware": hardware(), "versions": named, "threads": threads}
