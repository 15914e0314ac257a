"""One contender of `benchmarks/steering.py` in a process of its own: measured on command, or trained for its curve.

    python benchmarks/contenders/updates.py CONTENDER JOB QUESTIONS measure | curve

`measure` answers commands on standard input, one a line: `update` takes a turn and answers with the seconds of its last
update, those of the rollout, and what the completions were; `reset` with null; `peak` with MiB and the bytes of
gradients and of optimiser state. `curve` answers with the mean reward of each update of the job.

A contender is made of (job, questions, a list that holds the bare model, which it may empty) and has `fit(clock)`: its
library's own training loop, which tells the clock where each update begins.
"""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from job import Clock, Job, Over, Questions
from meter import MIB, Sizes, answers, memory, release, reset_peak

from trimtab.pretrained import load_model

TURN = 2
"""Updates taken at a command, of which the last counts: those before it get back the memory that others had."""


def main(name: str, job: Job, questions: Path, mode: str) -> None:
    with answers() as answer:
        make = getattr(importlib.import_module(name.split(".")[0]), name.split(".")[1])
        bare = [load_model(job.model, "bfloat16", job.device)]
        with torch.no_grad():  # once, so that what a library loads late is there before memory is counted
            bare[0](torch.tensor([[1, 2]], device=job.device))
        if mode == "measure":
            measure(
                lambda: make(job, Questions.read(questions), bare), bare[0].get_memory_footprint() / MIB, job, answer
            )
        else:
            answer(curve(make(job, Questions.read(questions), bare), job))


def measure(make: Callable[[], Any], model_mib: float, job: Job, answer: Callable[[Any], None]) -> None:
    """Until standard input ends. Memory counts from here: libraries are imported, the bare model is loaded."""
    release()
    base, sizes = memory(job.device), Sizes()

    def wait() -> None:
        if len(clock.updates) % TURN:
            return
        release()
        answer(clock.updates[-1] if clock.updates else "ready")
        for line in sys.stdin:
            match line.strip():
                case "update":
                    return
                case "reset":
                    reset_peak(job.device)
                    answer(None)
                case "peak":
                    answer({"peak_mib": memory(job.device, peak=True) - base, "model_mib": model_mib, **sizes.found})
        raise Over

    clock = Clock(job.device, wait)
    run(make(), clock)


def curve(contender: Any, job: Job) -> list[float]:
    """Mean reward of each update."""

    def wait() -> None:
        if len(clock.updates) == job.updates:
            raise Over

    clock = Clock(job.device, wait)
    run(contender, clock)
    return [update["reward"] for update in clock.updates]


def run(contender: Any, clock: Clock) -> None:
    try:
        contender.fit(clock)
    except Over:
        return


if __name__ == "__main__":
    name, given, questions, mode = sys.argv[1:]
    main(name, Job(**json.loads(given)), Path(questions), mode)
