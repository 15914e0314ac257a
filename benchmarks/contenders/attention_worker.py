"""One contender of `benchmarks/rebased.py` in a process of its own.

    python benchmarks/contenders/attention_worker.py CONTENDER

Answers commands on standard input, one a line, with a line of JSON: `forward LENGTH` and `both LENGTH` (forwards and
backwards) with milliseconds, `peak LENGTH` with the MiB that `both` had resident above what the inputs take, `step
LENGTH` with the milliseconds of a token of decoding after a context of that length.
"""

import functools
import sys
import time

import attention
import torch
from meter import answers, memory, release, reset_peak
from torch import Tensor

HEADS, D_K, D_V = 12, 16, 64
STEPS = 200
"""Tokens that a time of decoding is the mean of."""


@functools.cache
def inputs(length: int) -> tuple[Tensor, ...]:
    """q, k, v of a random sequence, and a gradient of the output."""
    torch.manual_seed(length)
    return tuple(torch.randn(1, length, HEADS, width) for width in (D_K, D_K, D_V, D_V))


def timed(name: str, length: int, *, backwards: bool) -> float:
    """Milliseconds."""
    *qkv, gradient = inputs(length)
    leaves = [x.detach().requires_grad_(backwards) for x in qkv]
    began = time.perf_counter()
    with torch.set_grad_enabled(backwards):
        out = getattr(attention, name)(*leaves)
    if backwards:
        out.backward(gradient)
    return 1e3 * (time.perf_counter() - began)


def peak(name: str, length: int) -> float:
    """MiB above what was resident before."""
    inputs(length)
    release()
    before = memory("cpu")
    reset_peak("cpu")
    timed(name, length, backwards=True)
    found = memory("cpu", peak=True) - before
    release()
    return found


def step(name: str, length: int) -> float:
    """Mean milliseconds of a token."""
    decoder = getattr(attention, name)(*inputs(length)[:3], STEPS)
    tokens = [tuple(torch.randn(1, HEADS, width) for width in (D_K, D_K, D_V)) for _ in range(STEPS)]
    began = time.perf_counter()
    for token in tokens:
        decoder(*token)
    return 1e3 * (time.perf_counter() - began) / STEPS


def main(name: str) -> None:
    with answers() as answer:
        answer("ready")
        for line in sys.stdin:
            command, length = line.split()
            match command:
                case "forward" | "both":
                    answer(timed(name, int(length), backwards=command == "both"))
                case "peak":
                    answer(peak(name, int(length)))
                case "step":
                    answer(step(name, int(length)))


if __name__ == "__main__":
    main(sys.argv[1])
