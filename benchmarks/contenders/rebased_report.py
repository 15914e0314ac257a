"""What `benchmarks/rebased.py` writes into README.md, from its CSV: what was aimed at, and tables by length."""

from pathlib import Path

import polars as pl
from contenders import report

OURS, DECODER, PEERS = "chunked", "recurrent", ("quadratic", "cumulative", "sdpa")
NAMES = {
    "chunked": "Trimtab, chunked", "definition": "Trimtab, the definition", "quadratic": "quadratic, as in fla's naive",
    "cumulative": "running sum, as in zoology", "sdpa": "torch's softmax attention",
    "recurrent": "Trimtab, carried state",
    "key_value_cache": "softmax, cached keys and values",
}  # fmt: skip
HEADS = 12


def write(path: Path) -> None:
    """Rewrite the part of the README beside the CSV."""
    parts = [section(rows) for _, rows in pl.read_csv(path).group_by("device", maintain_order=True)]
    report.rewrite(path.with_name("README.md"), "rebased", parts)


def section(rows: pl.DataFrame) -> str:
    """One device."""
    first = rows.row(0, named=True)
    head = f"{report.measured_on(first)} fp32, batch 1, "
    lines = [head + f"{HEADS} heads, d_k = 16, d_v = 64.", "", *report.targets(targets(rows)), ""]
    for mode, title in (("forward", "forwards, ms"), ("both", "forwards and backwards, ms")):
        lines += [*by_length(rows.filter(pl.col("mode") == mode), title, "ms"), ""]
    lines += [*by_length(rows.filter(pl.col("mode") == "both"), "peak of both, MiB", "peak_mib"), ""]
    return "\n".join([*lines, *by_length(rows.filter(pl.col("kind") == "decoding"), "a token of decoding, ms", "ms")])


def by_length(rows: pl.DataFrame, title: str, value: str) -> list[str]:
    """A row for each contender, a column for each length, and how many times ours it is."""
    lengths = rows["length"].unique().sort().to_list()
    lines = [f"| {title} | {' | '.join(f'{n:,}' for n in lengths)} |", "|---|" + "---|" * len(lengths)]
    for name in rows["contender"].unique(maintain_order=True):
        cells = []
        for length in lengths:
            found = rows.filter((pl.col("contender") == name) & (pl.col("length") == length))
            if found.is_empty():
                cells.append("")
                continue
            row = found.row(0, named=True)
            number = (
                f"{row[value]:.3f}"
                if row[value] < 1
                else f"{row[value]:,.0f}"
                if row[value] >= 100
                else f"{row[value]:.1f}"
            )
            over = row["over_ours"] if value == "ms" else None
            cells.append(number + (f" ({over:.1f}x)" if over and name not in (OURS, DECODER) else ""))
        lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    return lines


def targets(rows: pl.DataFrame) -> list[tuple[str, float, str, float]]:
    """What was set out to be reached."""
    training = rows.filter(pl.col("kind") == "training")

    def value(name: str, length: int, mode: str, column: str = "ms") -> float:
        found = rows.filter((pl.col("contender") == name) & (pl.col("length") == length) & (pl.col("mode") == mode))
        return float(found[column][0])

    peers = training.filter(pl.col("contender").is_in(PEERS))
    decoded = rows.filter(pl.col("contender") == DECODER)["length"]
    longest = training["length"].max()
    matrix = HEADS * longest**2 * 4 / 2**20  # MiB of one matrix of weights, of which the quadratic form keeps several
    return [
        ("both at 4,096 tokens: the fastest other over ours",
         float(peers.filter((pl.col("length") == 4096) & (pl.col("mode") == "both"))["over_ours"].min()), ">=", 15.0),
        ("both, the fastest other over ours, at the worst length from 512 on",
         float(peers.filter(pl.col("mode") == "both")["over_ours"].min()), ">=", 1.0),
        ("forwards, the same", float(peers.filter(pl.col("mode") == "forward")["over_ours"].min()), ">=", 1.0),
        (f"both at {longest:,} tokens over that at half as many", value(OURS, longest, "both")
         / value(OURS, longest // 2, "both"), "<=", 2.2),
        (f"peak at {longest:,} tokens over one matrix of weights of the quadratic form",
         value(OURS, longest, "both", "peak_mib") / matrix, "<=", 0.1),
        (f"decoding after {decoded.max():,} tokens over after {decoded.min():,}",
         value(DECODER, decoded.max(), "step") / value(DECODER, decoded.min(), "step"), "<=", 1.2),
        ("decoding after 512 tokens: cached keys and values over ours",
         float(rows.filter((pl.col("contender") == "key_value_cache") & (pl.col("length") == 512))["over_ours"][0]),
         ">=", 1.0),
    ]  # fmt: skip
