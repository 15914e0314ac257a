"""Which items a step takes: each once an epoch, in an order of the epoch's own, so that any step can be taken alone."""

from functools import lru_cache

import torch
from torch import Tensor


def batch_of(number: int, size: int, total: int, seed: int) -> list[int]:
    """Which of `total` items the step of this number (from 1) takes, `size` of them."""
    places = [divmod(place, total) for place in range((number - 1) * size, number * size)]
    return [int(_order(epoch, total, seed)[within]) for epoch, within in places]


@lru_cache(maxsize=2)  # a step may reach from one epoch into the next
def _order(epoch: int, total: int, seed: int) -> Tensor:
    return torch.randperm(total, generator=torch.Generator().manual_seed(mix(seed, -1 - epoch)))


def mix(seed: int, number: int) -> int:
    """A seed for one purpose, far from its neighbours."""
    return (seed * 1_000_003 + number * 7_919 + 2**40) % 2**63
