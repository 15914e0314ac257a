"""Which items a step takes: each once an epoch, in an order of the epoch's own, so that any step can be taken alone."""

import torch


def batch_of(number: int, size: int, total: int, seed: int) -> list[int]:
    """Which of `total` items the step of this number (from 1) takes, `size` of them."""
    orders: dict[int, list[int]] = {}
    chosen = []
    for place in range((number - 1) * size, number * size):
        epoch, within = divmod(place, total)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(mix(seed, -1 - epoch))
            orders[epoch] = torch.randperm(total, generator=generator).tolist()
        chosen.append(orders[epoch][within])
    return chosen


def mix(seed: int, number: int) -> int:
    """A seed for one purpose, far from its neighbours."""
    return (seed * 1_000_003 + number * 7_919 + 2**40) % 2**63
