"""SAE training side by side: a whole step, the decoder's loss alone, memory, and what comes out of equal tokens.

    python benchmarks/sae.py [--rounds 7] [--k 16 32 64 128] [--threads 2]

Contenders are this project's arms, a dense compiled step, and other libraries' own trainers (`make peers`), each in a
process of its own (`contenders/worker.py`), all fed the same rows. They take turns in random order, so that a slow
moment of the machine hits them alike; times are medians over rounds, ratios are medians of per-round ratios. With a GPU
its shapes are measured as well. Writes benchmarks/sae.csv, in which rows of an absent device stay as they were, and the
table of benchmarks/README.md.
"""

import argparse
import dataclasses
import json
import os
import random
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import polars as pl
import torch
import torch.nn.functional as F
from contenders import report, sae_report
from contenders.shape import Shape
from contenders.turns import Worker, command_line, need_peers, threads_of
from safetensors.torch import save_file
from tqdm import tqdm

from trimtab.activations import ActivationCache
from trimtab.activations.reading import CHUNK

ROOT = Path(__file__).parents[1]
OURS, HELD_OUT = "Trimtab TopK", 8192
CPU = {"d_model": 576, "latents": 4096, "batch": 2048}
GPU = {"d_model": 2304, "latents": 65_536, "batch": 4096, "device": "cuda"}
TRAINING = {"k": 32, "batch": 1024}
"""Shape of the runs that FVU is read from; it has 100 steps, as many rows as 50 of the measured ones."""


@dataclass(frozen=True)
class Contender:
    name: str
    where: str
    """`module.Class` in `contenders/`; what is in `peers` runs in the peers' environment."""
    rates: tuple[float, ...] = ()
    """Learning rates that its FVU is the best of, and beyond where the best is at an end; none: it is not trained."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    bf16: bool = True
    """Whether it knows bf16 products on that device."""

    def command(self, shape: Shape, data: Path, *mode: str) -> list[str]:
        arguments = (json.dumps(dataclasses.asdict(shape)), str(data), *mode)
        return command_line("worker.py", self.where, *arguments, peer=self.where.startswith("peers."))


Times = dict[str, list[float]]
RATES = (2e-3, 4e-3, 8e-3)
CONTENDERS = [
    Contender(OURS, "ours.Trimtab", RATES),
    Contender("Trimtab HierarchicalTopK, J = powers of two", "ours.TrimtabPowersOfTwo", RATES),
    Contender("Trimtab HierarchicalTopK, J = 1..K", "ours.TrimtabAll", RATES),
    Contender("dense, torch.compile", "ours.Dense"),
    Contender("all prefixes at once, torch.compile", "ours.DensePrefixes", devices=("cuda",)),
    Contender("rank by rank, index_add", "ours.RankByRank", devices=("cuda",)),
    Contender("sae-lens", "peers.SAELens", RATES, devices=("cpu",)),
    Contender("dictionary-learning", "peers.DictionaryLearning", (4e-3, 8e-3, 16e-3), devices=("cpu",), bf16=False),
    Contender("eai-sparsify", "peers.Sparsify", RATES, devices=("cpu",), bf16=False),
]


def measure(contenders: list[Contender], shape: Shape, data: Path, rounds: int) -> list[dict[str, Any]]:
    """One row for each contender; see the module."""
    title = f"{shape.device} K={shape.k} {shape.precision}"
    log = data.with_suffix(".log")
    workers = [Worker(c.name, c.command(shape, data, "measure"), log) for c in contenders]
    try:
        times, peaks = take_turns(workers, title, rounds)
    finally:
        for worker in workers:
            worker.close()
    rows = []
    for name, peak in peaks.items():
        row = {"contender": name, **dataclasses.asdict(shape), "peak_mib": peak}
        row["tokens_per_s"] = round(1e3 * shape.batch / median(times["step"][name]))
        for command, by_name in times.items():
            ms = by_name[name]
            row |= {f"{command}_ms": median(ms), f"{command}_low": min(ms), f"{command}_high": max(ms)}
            row[f"{command}_over_ours"] = median(a / b for a, b in zip(ms, by_name[OURS], strict=True))
        rows.append({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    return rows


def take_turns(workers: list[Worker], title: str, rounds: int) -> tuple[dict[str, Times], dict[str, float]]:
    """(milliseconds by command and name, one for each round; peak MiB of the steps by name)."""
    for worker in tqdm(workers, desc=f"{title} warm-up"):
        worker.answer()
        for command in ("step", "decoder", "step", "decoder", "reset"):
            worker.ask(command)
    times: dict[str, Times] = {c: {w.name: [] for w in workers} for c in ("step", "decoder")}
    peaks: dict[str, float] = {}
    chance = random.Random(0)
    for command, by_name in times.items():
        for _ in tqdm(range(rounds), desc=f"{title} {command}"):
            for worker in chance.sample(workers, len(workers)):
                by_name[worker.name].append(worker.ask(command))
        peaks = peaks or {worker.name: worker.ask("peak") for worker in workers}
    return times, peaks


def train(contenders: list[Contender], shape: Shape, data: Path, threads: int) -> dict[str, tuple[float, float]]:
    """(held-out FVU, learning rate) of each contender that has rates, at the best of them.

    Time does not matter here: as many contenders as threads train side by side, on one thread each.
    """

    def best(contender: Contender) -> tuple[float, float]:
        command = contender.command(shape, data, "train", *map(str, contender.rates))
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", check=False, env=os.environ | threads_of(1)
        )
        if done.returncode:
            raise RuntimeError(f"{contender.name} stopped: {done.stderr[-2000:]}")
        found = {float(rate): fvu for rate, fvu in json.loads(done.stdout).items()}
        rate = min(found, key=found.__getitem__)
        return round(found[rate], 4), rate

    training = [contender for contender in reversed(contenders) if contender.rates]  # the slow ones first
    with ThreadPoolExecutor(threads) as pool:
        results = list(tqdm(pool.map(best, training), total=len(training), desc=f"{shape.device} training"))
    return {contender.name: result for contender, result in zip(training, results, strict=True)}


def write_rows(folder: Path, shape: Shape, steps: int) -> tuple[Path, str]:
    """The rows that all contenders read: (file, what they are)."""
    train_cache, test_cache = ROOT / "data/activations/train", ROOT / "data/activations/test"
    measured, trained, batch = 4 * shape.batch, steps * TRAINING["batch"], TRAINING["batch"]
    if shape.d_model == CPU["d_model"] and (train_cache / "manifest.json").is_file():
        stream = ActivationCache(train_cache, checksums=False).batches(batch, seed=0)
        rows = torch.cat([next(stream) for _ in range((measured + trained) // batch)])
        chunks = islice(ActivationCache(test_cache, checksums=False).read(), -(-HELD_OUT // CHUNK))
        held_out = torch.cat([chunk["x"] for chunk in chunks])
        origin = "activations of data/activations"
    else:
        rows, held_out = synthetic(shape.d_model, measured + trained), synthetic(shape.d_model, HELD_OUT, seed=1)
        origin = "synthetic: 32 of 4 d directions, exponential amplitudes, noise"
    path = folder / f"rows-{shape.d_model}.safetensors"
    tensors = {
        "measured": rows[:measured].view(4, shape.batch, -1),
        "train": rows[measured:].view(steps, batch, -1),
        "held_out": held_out[:HELD_OUT],
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path, origin


def synthetic(d_model: int, rows: int, seed: int = 0) -> torch.Tensor:
    directions = F.normalize(torch.randn(4 * d_model, d_model, generator=torch.Generator().manual_seed(0)), dim=1)
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(len(directions), (rows, 32), generator=generator)
    amplitudes = torch.empty(rows, 32).exponential_(generator=generator)
    x = F.embedding_bag(indices, directions, per_sample_weights=amplitudes, mode="sum")
    x += 0.02 * torch.randn(x.shape, generator=generator)
    return (x - x.mean(dim=0)) * (d_model**0.5 / x.norm(dim=1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--k", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--steps", type=int, default=100, help="of the runs that FVU is read from")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    need_peers()
    os.environ |= threads_of(options.threads) | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TQDM_DISABLE": "1"}
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for device in devices:
            table += device_rows(device, options, Path(folder))
    sae_report.write(options.out, pl.DataFrame(table, infer_schema_length=None), devices)


def device_rows(device: str, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Every shape and precision of a device."""
    contenders = [contender for contender in CONTENDERS if device in contender.devices]
    base = Shape(**(CPU if device == "cpu" else GPU), k=TRAINING["k"])
    data, origin = write_rows(folder, base, options.steps if device == "cpu" else 1)
    shapes = [dataclasses.replace(base, k=k) for k in (options.k if device == "cpu" else (32, 128))]
    rows = [row for shape in shapes for row in measure(contenders, shape, data, options.rounds)]
    half = [contender for contender in contenders if contender.bf16]
    rows += measure(half, dataclasses.replace(base, precision="bf16"), data, options.rounds)
    if device == "cpu":
        fvu = train(contenders, dataclasses.replace(base, **TRAINING), data, options.threads)
        for row in rows:
            if (row["k"], row["precision"]) == (base.k, base.precision) and row["contender"] in fvu:
                row["fvu"], row["rate"] = fvu[row["contender"]]
    stamp = report.stamp(options.threads, peers=sae_report.PEERS, own=[]) | {"data": origin}
    return [row | stamp for row in rows]


if __name__ == "__main__":
    main()
