"""On a CPU: features and their gradient, with the tokens of a chunk side by side, and a whole step of decoding; numba.

Gathers of columns in torch would take as long as the matrix products that they serve, and a step of decoding in torch
more time to begin its operations than to read its state.
"""

import math
from typing import no_type_check

import numba as nb
import numpy as np
import torch
from jaxtyping import Bool, Float
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
    state: Float[Tensor, "rows features d_v_and_2"],
    polynomial: Polynomial,
    scale: float,
    eps: float,
    share: float,
) -> Float[Tensor, "rows d_v"]:
    """`recurrent.step`: `state` takes in the token, in place, and is read. `share`: FLOOR of `denominator`."""
    out = torch.empty_like(v)
    _step(q.numpy(), k.numpy(), v.numpy(), state.numpy(), out.numpy(), *_roots(polynomial, scale), eps, share)
    return out


def denominators(
    q: Float[Tensor, "batch time heads d_k"],
    k: Float[Tensor, "batch time heads d_k"],
    mask: Bool[Tensor, "batch time"] | None,
    total: Float[Tensor, "rows features"],
    polynomial: Polynomial,
    scale: float,
    causal: bool,
) -> tuple[Float[Tensor, "rows time"], Float[Tensor, "rows time"]]:
    """z of every token and the bound of `denominator`, in fp64; `total`, the sum of phi(k_j), takes in the keys."""
    q, k = (x.detach().to(torch.float64).contiguous() for x in (q, k))
    seen = torch.ones(k.shape[:2], dtype=torch.bool) if mask is None else mask.contiguous()
    z, bound = (torch.empty(len(total), q.shape[1], dtype=torch.float64) for _ in range(2))
    arrays = (x.numpy() for x in (q, k, seen, total, z, bound))
    _denominators(*arrays, *_roots(polynomial, scale), causal)
    return z, bound


def _roots(polynomial: Polynomial, scale: float) -> tuple[float, float, float]:
    """The weights in phi(x) of 1, x_a and x_a^2."""
    return math.sqrt(polynomial.constant), math.sqrt(polynomial.linear * scale), scale * math.sqrt(polynomial.quadratic)


@no_type_check
@jit(parallel=True, fastmath=FAST)
def _step(q, k, v, state, out, constant, linear, square, eps, share):
    rows, width = q.shape
    other = math.sqrt(2.0) * square
    for r in nb.prange(rows):
        sums = np.zeros(v.shape[1], dtype=v.dtype)
        z = size_q = size = 0.0
        at = 0
        if constant:
            size_q, size = constant, _token(state[r, at], v[r], constant, constant, sums)
            z += constant * size
            at += 1
        if linear:
            for a in range(width):
                of_query, of_key = np.float64(q[r, a]) * linear, np.float64(k[r, a]) * linear
                z += of_query * _token(state[r, at], v[r], of_query, of_key, sums)
                at += 1
        for a in range(width):
            for b in range(a, width):
                factor = square if a == b else other
                of_query = np.float64(q[r, a]) * np.float64(q[r, b]) * factor
                total = _token(state[r, at], v[r], of_query, np.float64(k[r, a]) * np.float64(k[r, b]) * factor, sums)
                z += of_query * total
                if a == b:
                    size_q, size = size_q + of_query, size + total
                at += 1
        below = max(z, share * size_q * size) + eps
        for c in range(v.shape[1]):
            out[r, c] = sums[c] / below


@no_type_check
@jit(fastmath=FAST, inline="always")
def _token(state, v, of_query, of_key, sums):
    """One feature: its row of the state takes in the key, and is added to the sums times the query's. The feature's
    sum over keys, in fp64, which the row's last two numbers hold."""
    by_key, by_query = v.dtype.type(of_key), v.dtype.type(of_query)
    width = len(v)
    for c in range(width):
        state[c] += by_key * v[c]
        sums[c] += by_query * state[c]
    total = np.float64(state[width]) + np.float64(state[width + 1]) + of_key
    state[width] = total
    state[width + 1] = total - np.float64(state[width])
    return total


@no_type_check
@jit(parallel=True, fastmath=FAST)
def _denominators(q, k, seen, total, z, bound, constant, linear, square, causal):
    batch, time, heads, width = q.shape
    other = math.sqrt(2.0) * square
    for r in nb.prange(batch * heads):
        b, h = r // heads, r % heads
        # Of the features, the squares as a whole matrix: rows of one length are added side by side.
        first, count = np.zeros(width), 0.0
        moments, columns = np.zeros((width, width)), np.zeros(width)
        at = 0
        if constant:
            count, at = total[r, 0] / constant, 1
        if linear:
            for a in range(width):
                first[a] = total[r, at] / linear
                at += 1
        start = at
        for a in range(width):
            for c in range(a, width):
                moments[a, c] = moments[c, a] = total[r, at] / (square if a == c else other)
                at += 1
        size = 0.0
        for a in range(width):
            size += moments[a, a]
        if not causal:
            for t in range(time):
                if seen[b, t]:
                    count += 1
                    for a in range(width):
                        first[a] += k[b, t, h, a]
                        size += k[b, t, h, a] * k[b, t, h, a]
                        for c in range(width):
                            moments[a, c] += k[b, t, h, a] * k[b, t, h, c]
        for t in range(time):
            taken = 1.0 if causal and seen[b, t] else 0.0
            count += taken
            below, length = 0.0, 0.0
            columns[:] = 0
            query, key = q[b, t, h], k[b, t, h]
            for a in range(width):
                row, by_query, by_key = moments[a], query[a], taken * key[a]
                length += by_query * by_query
                size += by_key * key[a]
                first[a] += by_key
                below += linear * linear * by_query * first[a]
                for c in range(width):
                    row[c] += by_key * key[c]
                    columns[c] += by_query * row[c]
            for c in range(width):
                below += square * square * columns[c] * query[c]
            z[r, t] = below + constant * constant * count
            bound[r, t] = (constant + square * length) * (constant * count + square * size)
        if constant:
            total[r, 0] = constant * count
        if linear:
            for a in range(width):
                total[r, start - width + a] = linear * first[a]
        at = start
        for a in range(width):
            for c in range(a, width):
                total[r, at] = moments[a, c] * (square if a == c else other)
                at += 1


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
