"""Contenders that are all there at once, each in a process of its own, and take turns on command."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

FOLDER = Path(__file__).parent
PEERS = Path(os.environ.get("TRIMTAB_PEERS", FOLDER.parents[1] / ".venv-peers")) / "bin/python"
"""The other libraries' environment, which `make peers` makes."""


def need_peers() -> None:
    """End the program with a message where that environment is missing."""
    if not PEERS.is_file():
        raise SystemExit("The other libraries are not installed: run `make peers`.")


def command_line(worker: str, where: str, *arguments: str, peer: bool) -> list[str]:
    """What starts contender `where` (module.Class) under one of the worker scripts of this folder."""
    return [str(PEERS) if peer else sys.executable, str(FOLDER / worker), where, *arguments]


def threads_of(number: int) -> dict[str, str]:
    """Environment variables that set it."""
    return {name: str(number) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}


def environment(threads: int) -> dict[str, str]:
    """Environment variables of contenders that train a language model."""
    return threads_of(threads) | {
        "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TQDM_DISABLE": "1",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # for all; the pipeline's kernels have it too
        "PYTHONPATH": str(FOLDER.parents[1] / "lib"),  # for the peers' environment: it has what Trimtab needs, not it
    }  # fmt: skip


class Worker:
    """A contender's process: a line of JSON when it is ready, and one for each command."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name, self.log = name, log
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("a", encoding="utf-8"),
            encoding="utf-8",
            bufsize=1,
        )

    def answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} stopped: {self.log.read_text(encoding='utf-8')[-2000:]}")
        return json.loads(line)

    def ask(self, command: str) -> Any:
        self.process.stdin.write(command + "\n")
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def take_turns(workers: list[Worker], title: str, rounds: int) -> tuple[dict[str, list], dict[str, dict]]:
    """(updates by name, one for each round; memory by name), after a warm-up turn each."""
    for worker in tqdm(workers, desc=f"{title} warm-up"):
        for answer in (worker.answer, lambda w=worker: w.ask("update"), lambda w=worker: w.ask("reset")):
            answer()
    taken: dict[str, list] = {worker.name: [] for worker in workers}
    chance = random.Random(0)
    for _ in tqdm(range(rounds), desc=title):
        for worker in chance.sample(workers, len(workers)):
            taken[worker.name].append(worker.ask("update"))
    return taken, {worker.name: worker.ask("peak") for worker in workers}


def seconds_of(updates: list[dict[str, float]], ours: list[dict[str, float]]) -> dict[str, float]:
    """Medians of a contender's rounds, and of its ratios to the same rounds of ours."""
    seconds, rollout, own = ([each[key] for each in some] for some, key in
                             ((updates, "seconds"), (updates, "rollout_s"), (ours, "seconds")))  # fmt: skip
    row = {"seconds": median(seconds), "low": min(seconds), "high": max(seconds)}
    row |= {"over_ours": median(a / b for a, b in zip(seconds, own, strict=True)), "rollout_s": median(rollout)}
    return row | {"update_s": median(a - b for a, b in zip(seconds, rollout, strict=True))}
