"""One contender in a process of its own: measured on command, or trained at several learning rates.

    python benchmarks/contenders/worker.py CONTENDER SHAPE DATA measure
    python benchmarks/contenders/worker.py CONTENDER SHAPE DATA train RATE...

`measure` answers commands on standard input, one a line: `step` and `decoder` with milliseconds, `reset` with null,
`peak` with MiB. `train` answers with the held-out FVU by rate. Answers are lines of JSON on standard output.

A contender is made of (shape, rate, steps) and has `fit(batches)`, which takes a whole training step on each batch;
`decoder_loss(x, values, indices)`, forward and backward of the decoder's loss alone; and `reconstruct(x)`. It is `fit`
that asks for batches, so that a library's own loop can be driven: a step lasts from one batch to the next request.
"""

import gc
import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from shape import Shape

WARM_STEPS = 10_000
"""Steps that a measured contender believes it will take: its learning rate stays in warm-up and constant phases."""
MIB = 2**20


def main(contender: str, shape: Shape, data: Path, mode: str, rates: list[float]) -> None:
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)  # whatever a library prints goes to the log
        make = getattr(importlib.import_module(contender.split(".")[0]), contender.split(".")[1])
        with safe_open(str(data), "pt") as file:
            if mode == "measure":
                batches = [file.get_slice("measured")[i].to(shape.device) for i in range(4)]
                measure(make, shape, batches, lambda answer: print(json.dumps(answer), file=answers))
            else:
                print(json.dumps(sweep(lambda rate: fvu(make, shape, file, rate), rates)), file=answers)


def measure(make: Callable[..., Any], shape: Shape, batches: list[torch.Tensor], answer: Callable) -> None:
    """Until standard input ends. Memory is counted from here: libraries are imported, batches are loaded."""
    gc.collect()
    base = memory(shape)
    contender = make(shape, 1e-4, WARM_STEPS)
    directions = F.normalize(torch.randn(shape.latents, shape.d_model, generator=torch.Generator().manual_seed(0)))

    def commands() -> Iterator[torch.Tensor]:
        answer("ready")
        rows = itertools.cycle(batches)
        for line in sys.stdin:
            command = line.strip()
            if command == "step":
                x = next(rows)
                began = now(shape)
                yield x
                answer(1e3 * (now(shape) - began))
            elif command == "decoder":
                x = next(rows)
                with torch.no_grad():
                    values, indices = torch.relu(x @ directions.to(x).T).topk(shape.k, dim=1)
                values.requires_grad_()
                began = now(shape)
                contender.decoder_loss(x, values, indices)
                answer(1e3 * (now(shape) - began))
            elif command == "reset":
                reset_peak(shape)
                answer(None)
            elif command == "peak":
                answer(memory(shape, peak=True) - base)

    contender.fit(commands())


def sweep(fvu_at: Callable[[float], float], rates: list[float]) -> dict[float, float]:
    """FVU by rate; where the best is the first or the last of the grid, the grid goes on by factors of two."""
    found = {rate: fvu_at(rate) for rate in rates}
    while len(found) < len(rates) + 3:
        best = min(found, key=found.__getitem__)
        if min(found) < best < max(found):
            break
        rate = best / 2 if best == min(found) else best * 2
        found[rate] = fvu_at(rate)
    return found


def fvu(make: Callable[..., Any], shape: Shape, file: Any, rate: float) -> float:
    """FVU on held-out rows after one pass over the training rows."""
    train, held_out = file.get_slice("train"), file.get_tensor("held_out")
    steps = train.get_shape()[0]
    contender = make(shape, rate, steps)
    contender.fit(train[i].to(shape.device) for i in range(steps))
    error = total = 0.0
    with torch.no_grad():
        for x in held_out.split(shape.batch):
            error += (contender.reconstruct(x.to(shape.device)).float().cpu() - x).square().sum().item()
            total += x.square().sum().item()
    return error / total


def now(shape: Shape) -> float:
    if shape.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def memory(shape: Shape, *, peak: bool = False) -> float:
    """MiB: resident set of this process, or what its tensors hold on the GPU; now, or the most since `reset_peak`."""
    if shape.device == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / MIB
    name = "VmHWM:" if peak else "VmRSS:"
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def reset_peak(shape: Shape) -> None:
    if shape.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets the resident set's high-water mark


if __name__ == "__main__":
    name, given, data, mode, *rates = sys.argv[1:]
    main(name, Shape(**json.loads(given)), Path(data), mode, [float(rate) for rate in rates])
