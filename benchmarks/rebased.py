"""Polynomial attention side by side with what one would use instead: time forwards and backwards, memory, decoding.

    python benchmarks/rebased.py [--rounds 5] [--threads 2] [--lengths 512 1024 ...]

Each contender (`contenders/attention.py`) is in a process of its own; at each length they take turns in random order.
Times are medians over rounds, ratios medians of per-round ratios; batch 1, 12 heads, d_k = 16, d_v = 64, fp32. A form
that would need more than `LONGEST` allows is left out beyond it. Writes benchmarks/rebased.csv, in which rows of an
absent device stay as they were, and the table of benchmarks/README.md.
"""

import argparse
import os
import random
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import polars as pl
from contenders import rebased_report, report
from contenders.turns import Worker, command_line, environment
from tqdm import tqdm

LENGTHS = [512, 1024, 2048, 4096, 8192, 16_384]
LONGEST = {"quadratic": 4096, "cumulative": 4096, "definition": 4096}
"""Tokens up to which a contender is run: the matrices of 4,096 tokens take 5 GB, the running sums as much."""
TRAINING = ("chunked", "definition", "quadratic", "cumulative", "sdpa")
DECODING = ("recurrent", "key_value_cache")
CONTEXTS = [128, 512, 2048, 8192, 16_384]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    if not {512, 4096, max(options.lengths) // 2} <= {*options.lengths} or 512 not in options.contexts:
        parser.error("the targets need the lengths 512, 4096 and half the longest, and the context 512")
    os.environ |= environment(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            *measure(TRAINING, "training", options.lengths, options.rounds, Path(folder)),
            *measure(DECODING, "decoding", options.contexts, options.rounds, Path(folder)),
        ]
    stamp = {"device": "cpu"} | report.stamp(options.threads, peers=[], own=[])
    table = pl.DataFrame([row | stamp for row in rows], infer_schema_length=None)
    report.merge(options.out, table, pl.col("device").is_in(["cpu"]))
    rebased_report.write(options.out)


def measure(names: tuple[str, ...], kind: str, lengths: list[int], rounds: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each contender and length."""
    workers = {
        name: Worker(name, command_line("attention_worker.py", name, peer=False), folder / f"{name}.log")
        for name in names
    }
    for worker in workers.values():
        worker.answer()
    rows, chance = [], random.Random(0)
    for length in tqdm(lengths, desc=kind):
        present = [name for name in names if length <= LONGEST.get(name, length)]
        modes = ("forward", "both") if kind == "training" else ("step",)
        taken: dict[tuple[str, str], list[float]] = {(name, mode): [] for name in present for mode in modes}
        for number in range(rounds + 1):  # the first is a warm-up
            for name in chance.sample(present, len(present)):
                for mode in modes:
                    found = workers[name].ask(f"{mode} {length}")
                    if number:
                        taken[name, mode].append(found)
        for (name, mode), times in taken.items():
            ours = taken[names[0], mode]
            rows.append({
                "kind": kind, "contender": name, "length": length, "mode": mode, "ms": median(times), "low": min(times),
                "high": max(times), "over_ours": median(t / o for t, o in zip(times, ours, strict=True)),
                "peak_mib": workers[name].ask(f"peak {length}") if mode == "both" else None,
            })  # fmt: skip
    for worker in workers.values():
        worker.close()
    return rows


if __name__ == "__main__":
    main()
