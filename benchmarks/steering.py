"""A whole RL update side by side: rollout, reward, gradient, step; its time, memory, and what it teaches.

    python benchmarks/steering.py [--rounds 5] [--threads 2] [--devices cpu]
    python benchmarks/steering.py --curve [--seeds 0 1 2]

Contenders are this project's arms as the pipeline trains them, TRL's trainers (`make peers`), and transformers'
`generate` of the same completions, which trains nothing; each is in a process of its own (`contenders/updates.py`).
All train SmolLM2-135M on the same prompts of the task `sum`, in two regimes (`contenders/job.py`). They take turns in
random order, so that a slow moment of the machine hits them alike; times are medians over rounds, ratios are medians
of per-round ratios. With a GPU its shape is measured as well, ours only.

Writes benchmarks/steering.csv, in which rows of an absent device stay as they were, with --curve
benchmarks/steering-curve.csv instead, and from both the table of benchmarks/README.md.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import polars as pl
import torch
from contenders import report, steering_report
from contenders.turns import Worker, command_line, environment, need_peers, seconds_of, take_turns
from tqdm import tqdm

from trimtab.epochs import batch_of
from trimtab.rl.tasks import open_task

ROOT = Path(__file__).parents[1]
ITEMS = 800
SHAPES = {"cpu": {"prompts": 8, "group": 8, "tokens": 16}, "cuda": {"prompts": 64, "group": 8, "tokens": 256}}
REGIMES = ("fixed", "natural")
UPDATES, BATCHES = 10_000, 64
"""What a measured contender believes it will take; batches of prompts there are, after which they come again."""
RATE = 1e-5
"""Learning rate of measured updates, for all: it leaves the policy where it starts, so that rounds are alike."""
CURVE_UPDATES, CURVE_RATE = 10, 1e-2


@dataclass(frozen=True)
class Contender:
    name: str
    where: str
    """`module.Class` in `contenders/`; what is in `trl_trainers` runs in the peers' environment."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    curve: bool = False

    def command(self, job: dict[str, Any], questions: Path, mode: str) -> list[str]:
        peer = self.where.startswith("trl_trainers.")
        return command_line("updates.py", self.where, json.dumps(job), str(questions), mode, peer=peer)


CONTENDERS = [
    Contender(steering_report.OURS, "policies.Steering", curve=True),
    Contender("Trimtab, vector of the last layer", "policies.SteeringLast"),
    Contender("Trimtab, LoRA rank 1", "policies.LoRA"),
    Contender(steering_report.FULL, "policies.Full"),
    Contender(steering_report.RLOO, "trl_trainers.RLOO", devices=("cpu",), curve=True),
    Contender("TRL GRPO, biases", "trl_trainers.GRPO", devices=("cpu",)),
    Contender("TRL GRPO, biases, head on completions only", "trl_trainers.FewerLogits", devices=("cpu",)),
    Contender("TRL RLOO, LoRA rank 1", "trl_trainers.LoRA", devices=("cpu",)),
    Contender("TRL RLOO, full tuning", "trl_trainers.Full", devices=("cpu",)),
    Contender(steering_report.GENERATE, "policies.Generation"),
]


def measure(contenders: list[Contender], job: dict[str, Any], questions: Path, rounds: int) -> list[dict[str, Any]]:
    """One row for each contender in one regime."""
    workers = [Worker(c.name, c.command(job, questions, "measure"), questions.with_suffix(".log")) for c in contenders]
    try:
        taken, peaks = take_turns(workers, f"{job['device']} {job['regime']}", rounds)
    finally:
        for worker in workers:
            worker.close()
    rows = []
    for name, updates in taken.items():
        row = {key: job[key] for key in ("device", "regime", "prompts", "group", "tokens", "rate")}
        row |= {"contender": name, "rounds": rounds} | seconds_of(updates, taken[steering_report.OURS])
        row |= {"rollouts_per_s": job["prompts"] * job["group"] / row["seconds"]}
        row |= {"length": median(update["length"] for update in updates)} | peaks[name]
        rows.append({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    return rows


def curves(job: dict[str, Any], folder: Path, seeds: list[int]) -> pl.DataFrame:
    """Reward by update, of those whose learning is compared, all from the same start and at the same rate."""
    job = job | {"regime": "natural", "rate": CURVE_RATE, "updates": CURVE_UPDATES}
    rows = []
    for seed in tqdm(seeds, desc="curve"):
        questions = write_questions(folder, job["prompts"], seed)
        for contender in (each for each in CONTENDERS if each.curve):
            command = contender.command(job | {"seed": seed}, questions, "curve")
            done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
            if done.returncode:
                raise RuntimeError(f"{contender.name} stopped: {done.stderr[-2000:]}")
            common = {"device": job["device"], "contender": contender.name, "rate": CURVE_RATE, "seed": seed}
            rewards = json.loads(done.stdout)
            rows += [common | {"update": n, "reward": reward} for n, reward in enumerate(rewards, start=1)]
    return pl.DataFrame(rows)


def write_questions(folder: Path, prompts: int, seed: int = 0) -> Path:
    """Questions of the task and the order in which a seed takes them."""
    items = open_task("sum").items("train", ITEMS, seed=0)
    batches = [batch_of(number, prompts, ITEMS, seed) for number in range(1, BATCHES + 1)]
    path = folder / f"questions-{prompts}-{seed}.json"
    path.write_text(
        json.dumps({"items": [dataclasses.asdict(item) for item in items], "batches": batches}), encoding="utf-8"
    )
    return path


def main() -> None:
    present = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "data/model")
    parser.add_argument("--rounds", type=int, default=5)
    for name in ("prompts", "group", "tokens"):
        parser.add_argument(f"--{name}", type=int, help="in place of the benchmark's own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--devices", nargs="+", choices=present, default=present)
    parser.add_argument("--curve", action="store_true", help="learning curves (slow), and no times")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the curves")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    if "cpu" in options.devices:
        need_peers()
    os.environ |= environment(options.threads)
    given = {name: getattr(options, name) for name in ("prompts", "group", "tokens") if getattr(options, name)}
    jobs = [
        {"model": str(options.model.resolve()), "device": device, "rate": RATE, "updates": UPDATES}
        | SHAPES[device] | given
        for device in options.devices
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured = curves(jobs[0], folder, options.seeds) if options.curve else times(jobs, folder, options)
    steering_report.write(options.out, measured, curve=options.curve)


def times(jobs: list[dict[str, Any]], folder: Path, options: argparse.Namespace) -> pl.DataFrame:
    """Every device and regime."""
    stamp = report.stamp(options.threads, peers=["trl"], own=["transformers", "nnsight"])
    rows = []
    for job in jobs:
        contenders = [contender for contender in CONTENDERS if job["device"] in contender.devices]
        questions = write_questions(folder, job["prompts"])
        for regime in REGIMES:
            rows += measure(contenders, job | {"regime": regime}, questions, options.rounds)
    return pl.DataFrame([row | stamp for row in rows], infer_schema_length=None)


if __name__ == "__main__":
    main()
