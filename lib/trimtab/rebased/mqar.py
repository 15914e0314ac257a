"""Multi-query associative recall (Arora et al. 2024, "Zoology"): pairs of keys and values, then every key once more.

A row reads k1 v1 k2 v2 ... kP vP, then every key as a query, at every other place, in gaps drawn from a power law; the
places left hold the filler token 0. At a query the label is the key's value; nowhere else is there a loss. Keys are
ids 1 .. V/2 - 1, values V/2 .. V - 1, none twice in a row. The statistics are those of zoology's generator.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from trimtab.errors import InputError

IGNORED = -100
"""The label of a position without a loss."""
POWER = 0.01
"""Exponent of the gaps' law, zoology's `power_a`: a query at the g-th place has weight g^(POWER - 1)."""


@dataclass(frozen=True)
class Recall:
    """A batch of the task."""

    inputs: Int[Tensor, "rows time"]
    labels: Int[Tensor, "rows time"]
    """`IGNORED` but at queries, where the label is the value to be recalled."""


def recall(rows: int, time: int, pairs: int, vocabulary: int, generator: torch.Generator) -> Recall:
    """`rows` independent rows. Raises InputError where the pairs do not fit."""
    check_fits(time, pairs, vocabulary)
    half, told = vocabulary // 2, 2 * pairs
    keys = 1 + _distinct(rows, half - 1, pairs, generator)
    values = half + _distinct(rows, vocabulary - half, pairs, generator)
    places = (time - told) // 2
    weights = torch.arange(1, places + 1, dtype=torch.float64) ** (POWER - 1)
    at = told + 2 * _distinct(rows, places, pairs, generator, weights)
    inputs = torch.zeros(rows, time, dtype=torch.int64)
    inputs[:, :told:2], inputs[:, 1:told:2] = keys, values
    inputs.scatter_(1, at, keys)
    labels = torch.full_like(inputs, IGNORED).scatter_(1, at, values)
    return Recall(inputs, labels)


def check_fits(time: int, pairs: int, vocabulary: int) -> None:
    """Raise InputError where a row of this length cannot hold the pairs and ask for each."""
    if pairs < 1 or 4 * pairs > time:
        raise InputError(f"{pairs} pairs need rows of at least {4 * pairs} tokens, not {time}.")
    if vocabulary // 2 - 1 < pairs:
        raise InputError(f"{pairs} keys need a `vocabulary` of at least {2 * pairs + 2}, not {vocabulary}.")


def _distinct(
    rows: int, total: int, n: int, generator: torch.Generator, weights: Tensor | None = None
) -> Int[Tensor, "rows n"]:
    """In each row n different numbers below `total`, drawn one after the other in proportion to their weights: the n
    first of independent exponential clocks."""
    clocks = torch.empty(rows, total, dtype=torch.float64).exponential_(generator=generator)
    if weights is not None:
        clocks /= weights
    return clocks.topk(n, dim=1, largest=False).indices
