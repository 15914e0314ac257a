"""One update against repetition side by side: rollout, loss, gradient, step; its time and memory.

    python benchmarks/repetition.py [--rounds 3] [--threads 2] [--devices cpu]

Contenders (`contenders/against_repetition.py`) are this project's updates as the pipeline takes them, the published
algorithm in its published shape, and TRL's GRPO with its reward against repetition (`make peers`); each is in a process
of its own. All tune SmolLM2-135M fully, on the same prefixes. Those of one kind are there at once and take turns in
random order, so that a slow moment of the machine hits them alike; the next kind begins when they are gone, for not all
whole models fit beside one another. Times are medians over rounds, ratios medians of per-round ratios. With a GPU its
shape is measured as well, in bf16 and without TRL.

Writes benchmarks/repetition.csv, in which rows of an absent device stay as they were, and the table of
benchmarks/README.md; with another --out the README of that folder, where there is one.
"""

import argparse
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import polars as pl
import torch
from contenders import repetition_report, report
from contenders.turns import Worker, command_line, environment, need_peers, seconds_of, take_turns

from trimtab.errors import InputError
from trimtab.pretrained import load_tokenizer
from trimtab.repetition.texts import Library

ROOT = Path(__file__).parents[1]
SHAPES = {
    "cpu": {"prefixes": 6, "prefix_tokens": 50, "tokens": 100, "rows": 6},
    "cuda": {"prefixes": 64, "prefix_tokens": 50, "tokens": 100, "rows": 32},
}
RATE = 1e-8
"""Learning rate for all: it leaves the model where it starts, so that rounds are alike."""
BATCHES = 16
"""Of prefixes, after which they come again."""


@dataclass(frozen=True)
class Contender:
    name: str
    kind: str
    """Of update: those of one kind take turns, and are compared."""
    where: str
    """`module.Class` in `contenders/`; what is in `trl_repetition` runs in the peers' environment."""
    devices: tuple[str, ...] = ("cpu", "cuda")

    def command(self, job: dict[str, Any], prefixes: Path) -> list[str]:
        peer = self.where.startswith("trl_repetition.")
        return command_line("against_repetition.py", self.where, json.dumps(job), str(prefixes), peer=peer)


CONTENDERS = [
    Contender(repetition_report.OURS["policy"], "policy", "against_repetition.Policy"),
    Contender(repetition_report.PUBLISHED["policy"], "policy", "against_repetition.PublishedPolicy", ("cpu",)),
    Contender(repetition_report.PUBLISHED_BF16["policy"], "policy", "against_repetition.PublishedPolicyBF16"),
    Contender(repetition_report.TRL, "policy", "trl_repetition.GRPO", ("cpu",)),
    Contender(repetition_report.OURS["unlikelihood"], "unlikelihood", "against_repetition.Unlikelihood"),
    Contender(
        repetition_report.PUBLISHED["unlikelihood"], "unlikelihood", "against_repetition.PublishedUnlikelihood",
        ("cpu",),
    ),
    Contender(
        repetition_report.PUBLISHED_BF16["unlikelihood"], "unlikelihood",
        "against_repetition.PublishedUnlikelihoodBF16",
    ),
    Contender(repetition_report.BOTH, "unlikelihood", "against_repetition.Both"),
]  # fmt: skip
KINDS = tuple(repetition_report.OURS)


def measure(kind: str, job: dict[str, Any], prefixes: Path, rounds: int) -> list[dict[str, Any]]:
    """One row for each contender of a kind."""
    present = [each for each in CONTENDERS if each.kind == kind and job["device"] in each.devices]
    workers = [Worker(each.name, each.command(job, prefixes), prefixes.with_suffix(".log")) for each in present]
    try:
        taken, peaks = take_turns(workers, f"{job['device']} {kind}", rounds)
    finally:
        for worker in workers:
            worker.close()
    ours, generated = repetition_report.OURS[kind], job["prefixes"] * job["tokens"]
    rows = []
    for name, updates in taken.items():
        row = {key: job[key] for key in ("device", "prefixes", "prefix_tokens", "tokens")}
        row |= {"kind": kind, "contender": name, "rounds": rounds} | seconds_of(updates, taken[ours])
        row |= {f"{phase}_tokens_per_s": generated / row[f"{phase}_s"] for phase in ("rollout", "update")}
        row |= {key: median(update[key] for update in updates) for key in ("length", "reward")} | peaks[name]
        rows.append({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    return rows


def write_prefixes(path: Path, model: Path, corpus: Path, shape: dict[str, Any]) -> Path:
    """Batches of beginnings of training blocks: of those which, decoded and encoded, are themselves again, for TRL
    takes text."""
    tokenizer, size = load_tokenizer(model), shape["prefixes"]
    passages = Library(corpus).passages("train", "wikipedia", shape["prefix_tokens"], 4 * BATCHES * size, seed=0)
    found = [ids for ids in passages.tokens.tolist() if tokenizer(text=tokenizer.decode(ids))["input_ids"] == ids]
    whole = [found[i : i + size] for i in range(0, len(found) - size + 1, size)][:BATCHES]
    if not whole:
        raise InputError(f"{corpus} has {len(found)} prefixes to go on from, fewer than {size}.")
    path.write_text(json.dumps(whole), encoding="utf-8")
    return path


def main() -> None:
    present = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "data/model")
    parser.add_argument("--corpus", type=Path, default=ROOT / "data/corpus")
    parser.add_argument("--rounds", type=int, default=3)
    for name in ("prefixes", "tokens"):
        parser.add_argument(f"--{name}", type=int, help="in place of the benchmark's own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--devices", nargs="+", choices=present, default=present)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    if "cpu" in options.devices:
        need_peers()
    os.environ |= environment(options.threads)
    given = {name: getattr(options, name) for name in ("prefixes", "tokens") if getattr(options, name)}
    stamp = {"rate": RATE} | report.stamp(options.threads, peers=["trl"], own=["transformers", "nnsight"])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for device in options.devices:
            job = {"model": str(options.model.resolve()), "device": device, "rate": RATE} | SHAPES[device] | given
            try:
                prefixes = write_prefixes(Path(folder) / f"{device}.json", options.model, options.corpus, job)
            except InputError as error:
                raise SystemExit(str(error)) from error
            for kind in KINDS:
                rows += measure(kind, job, prefixes, options.rounds)
    repetition_report.write(options.out, pl.DataFrame([row | stamp for row in rows], infer_schema_length=None))


if __name__ == "__main__":
    main()
