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
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from meter import answers, memory, now, reset_peak
from safetensors import safe_open
from shape import Shape

WARM_STEPS = 10_000
"""Steps that a measured contender believes it will take: its learning rate stays in warm-up and constant phases."""


def main(contender: str, shape: Shape, data: Path, mode: str, rates: list[float]) -> None:
    with answers() as answer:
        make = getattr(importlib.import_module(contender.split(".")[0]), contender.split(".")[1])
        with safe_open(str(data), "pt") as file:
            if mode == "measure":
                batches = [file.get_slice("measured")[i].to(shape.device) for i in range(4)]
                measure(make, shape, batches, answer)
            else:
                answer(sweep(lambda rate: fvu(make, shape, file, rate), rates))


def measure(make: Callable[..., Any], shape: Shape, batches: list[torch.Tensor], answer: Callable) -> None:
    """Until standard input ends. Memory is counted from here: libraries are imported, batches are loaded."""
    gc.collect()
    base = memory(shape.device)
    contender = make(shape, 1e-4, WARM_STEPS)
    directions = F.normalize(torch.randn(shape.latents, shape.d_model, generator=torch.Generator().manual_seed(0)))

    def commands() -> Iterator[torch.Tensor]:
        answer("ready")
        rows = itertools.cycle(batches)
        for line in sys.stdin:
            command = line.strip()
            if command == "step":
                x = next(rows)
                began = now(shape.device)
                yield x
                answer(1e3 * (now(shape.device) - began))
            elif command == "decoder":
                x = next(rows)
                with torch.no_grad():
                    values, indices = torch.relu(x @ directions.to(x).T).topk(shape.k, dim=1)
                values.requires_grad_()
                began = now(shape.device)
                contender.decoder_loss(x, values, indices)
                answer(1e3 * (now(shape.device) - began))
            elif command == "reset":
                reset_peak(shape.device)
                answer(None)
            elif command == "peak":
                answer(memory(shape.device, peak=True) - base)

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


if __name__ == "__main__":
    name, given, data, mode, *rates = sys.argv[1:]
    main(name, Shape(**json.loads(given)), Path(data), mode, [float(rate) for rate in rates])
