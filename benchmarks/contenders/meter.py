"""Time and memory of a contender's process, and the channel on which it answers."""

import contextlib
import ctypes
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

MIB = 2**20


@contextlib.contextmanager
def answers() -> Iterator[Callable[[Any], None]]:
    """Answers are lines of JSON on standard output; whatever a library prints goes to the log."""
    with os.fdopen(os.dup(1), "w", buffering=1) as channel:
        os.dup2(2, 1)
        yield lambda answer: print(json.dumps(answer), file=channel)


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def memory(device: str, *, peak: bool = False) -> float:
    """MiB: resident set of this process, or what its tensors hold on the GPU; now, or the most since `reset_peak`."""
    if device == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / MIB
    name = "VmHWM:" if peak else "VmRSS:"
    (line,) = (
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(name)
    )
    return int(line.split()[1]) / 1024


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_bytes(b"5")  # man 5 proc: resets the resident set's high-water mark


def release() -> None:
    """Give free memory back to the system, so that contenders that wait fit beside the one whose turn it is."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class Sizes:
    """Trained numbers, and bytes of their gradients and of the optimiser's state, read off the tensors at each step."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        register_optimizer_step_post_hook(self.read)

    def read(self, optimiser: torch.optim.Optimizer, *_: Any) -> None:
        trained = [p for group in optimiser.param_groups for p in group["params"]]
        kept = [t for slots in optimiser.state.values() for t in slots.values() if isinstance(t, torch.Tensor)]
        self.found = {
            "parameters": sum(p.numel() for p in trained),
            "gradients": sum(p.grad.nbytes for p in trained if p.grad is not None),
            "optimiser": sum(t.nbytes for t in kept),
        }
