"""On a CPU: features and their gradient, with the tokens of a chunk side by side, and a whole step of decoding; numba.

Gathers of columns in torch would take as long as the matrix products that they serve, and a step of decoding in torch
more time to begin its operations than to read its state.
"""

import math
from typing import no_type_check

import numba as nb
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.rebased.kernels.polynomial import Polynomial
from trimtab.threads import jit

# Sums may be reassociated, which is what lets them be vectorised; infinities and NaN keep their meaning.
FAST = {"reassoc", "contract", "arcp", "nsz"}


def expand(
    x: Float[Tensor, "rows d_k chunk"], polynomial: Polynomial, scale: float
) -> Float[Tensor, "rows features chunk"]:
    """`polynomial.expand` of every token, with features before tokens."""
    rows, width, chunk = x.shape
    out = x.new_empty(rows, polynomial.features(width), chunk)
    first = polynomial.below(width)
    if polynomial.constant:
        out[:, 0] = math.sqrt(polynomial.constant)
    if polynomial.linear:
        out[:, first - width : first] = x * math.sqrt(polynomial.linear * scale)
    _expand(x.numpy(), out.numpy(), first, scale * math.sqrt(polynomial.quadratic))
    return out


def fold_into(
    gradient: Float[Tensor, "rows features chunk"],
    x: Float[Tensor, "rows d_k chunk"],
    out: Float[Tensor, "rows d_k chunk"],
    polynomial: Polynomial,
    scale: float,
) -> None:
    """Add to `out` the gradient in x, given that in `expand(x)`."""
    width = x.shape[1]
    first = polynomial.below(width)
    if polynomial.linear:
        out.add_(gradient[:, first - width : first], alpha=math.sqrt(polynomial.linear * scale))
    _fold(gradient.numpy(), x.numpy(), out.numpy(), first, scale * math.sqrt(polynomial.quadratic))


def step(
    q: Float[Tensor, "rows d_k"],
    k: Float[Tensor, "rows d_k"],
    v: Float[Tensor, "rows d_v"],
    state: Float[Tensor, "rows features d_v_and_1"],
    polynomial: Polynomial,
    scale: float,
    eps: float,
) -> Float[Tensor, "rows d_v"]:
    """`recurrent.step`: `state` takes in the token, in place, and is read."""
    out = torch.empty_like(v)
    root = math.sqrt(polynomial.constant), math.sqrt(polynomial.linear * scale), scale * math.sqrt(polynomial.quadratic)
    _step(q.numpy(), k.numpy(), v.numpy(), state.numpy(), out.numpy(), *root, eps)
    return out


@no_type_check
@jit(parallel=True, fastmath=FAST)
def _step(q, k, v, state, out, constant, linear, square, eps):
    rows, width = q.shape
    other = math.sqrt(2.0) * square
    for r in nb.prange(rows):
        sums = np.zeros(v.shape[1] + 1, dtype=v.dtype)
        at = 0
        if constant:
            _token(state[r, at], v[r], constant, constant, sums)
            at += 1
        if linear:
            for a in range(width):
                _token(state[r, at], v[r], q[r, a] * linear, k[r, a] * linear, sums)
                at += 1
        for a in range(width):
            for b in range(a, width):
                factor = square if a == b else other
                _token(state[r, at], v[r], q[r, a] * q[r, b] * factor, k[r, a] * k[r, b] * factor, sums)
                at += 1
        for c in range(v.shape[1]):
            out[r, c] = sums[c] / (sums[v.shape[1]] + eps)


@no_type_check
@jit(fastmath=FAST, inline="always")
def _token(state, v, of_query, of_key, sums):
    """One feature: its row of the state takes in the key, and is added to the sums times the query's."""
    by_key, by_query = v.dtype.type(of_key), v.dtype.type(of_query)
    for c in range(len(v)):
        state[c] += by_key * v[c]
        sums[c] += by_query * state[c]
    state[len(v)] += by_key
    sums[len(v)] += by_query * state[len(v)]


@no_type_check
@jit(parallel=True, fastmath=FAST)
def _expand(x, out, first, weight):
    rows, width, chunk = x.shape
    same, other = x.dtype.type(weight), x.dtype.type(math.sqrt(2.0) * weight)
    for r in nb.prange(rows):
        at = first
        for a in range(width):
            for b in range(a, width):
                factor = same if a == b else other
                for t in range(chunk):
                    out[r, at, t] = x[r, a, t] * x[r, b, t] * factor
                at += 1


@no_type_check
@jit(parallel=True, fastmath=FAST)
def _fold(gradient, x, out, first, weight):
    rows, width, chunk = x.shape
    same, other = x.dtype.type(weight), x.dtype.type(math.sqrt(2.0) * weight)
    for r in nb.prange(rows):
        at = first
        for a in range(width):
            for b in range(a, width):
                factor = same if a == b else other
                for t in range(chunk):
                    g = gradient[r, at, t] * factor
                    out[r, a, t] += g * x[r, b, t]
                    out[r, b, t] += g * x[r, a, t]
                at += 1
