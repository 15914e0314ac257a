"""The kernels on a CPU: numba, parallel over tiles of columns, the same sums in the same order for any thread count.

Each tile of TILE columns is worked through by one thread for all rows: every prefix of a row stays in the first-level
cache, and a tile of the gradient belongs to one thread alone, so that nothing is added atomically. With

    g_j = 2 w_j (x_hat_j - x),  S_t = sum over j >= t of g_j

the gradients are dL/dv_t = <e_t, S_t>, dL/dW_dec[i_t] += v_t S_t and dL/db_dec = S_0 summed over rows. Prefixes are
walked up for the loss and down again for the gradients, the way down re-deriving each from the next; memory is
O(batch d_model), and a weight of zero costs nothing. Everything is computed in fp32 (fp64 where the input is fp64).
"""

from typing import no_type_check

import numba as nb
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.threads import jit

TILE = 64
"""Columns to a tile: four 512-bit registers of fp32."""
GROUPS = 256
"""Groups whose maxima bound the k-th largest entry of a row from below."""
NAN = np.int32(0x7FC00000)
"""A NaN of fp32, as bits."""
# Sums may be reassociated, which is what lets them be vectorised; infinities and NaN keep their meaning.
FAST = {"reassoc", "contract", "arcp", "nsz"}


def select(pre: Float[Tensor, "batch latents"], k: int) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """As `naive.select`; values in fp32 (fp64 for fp64). A row that holds a NaN or an infinity gives only NaN."""
    if pre.dtype == torch.float64:
        return _select_by_sorting(pre, k)
    if pre.dtype == torch.bfloat16:  # its bits are the upper half of fp32's
        bits, shift = pre.detach().contiguous().view(torch.int16).numpy(), 16
    else:
        bits, shift = pre.detach().float().contiguous().view(torch.int32).numpy(), 0
    infinity = bits.dtype.type(0x7F800000 >> shift)
    values = torch.empty(len(pre), k)
    indices = torch.empty(len(pre), k, dtype=torch.int64)
    _select(bits, infinity, shift, k, max(GROUPS, 2 * k), values.view(torch.int32).numpy(), indices.numpy())
    return values, indices


def prefix_gradients(
    x: Float[Tensor, "batch d_model"],
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "latents d_model"],
    b_dec: Float[Tensor, " d_model"],
    weights: Float[Tensor, "rows prefixes"],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`naive.prefix_loss` and its gradients: (loss, d_values [batch, k], d_W_dec [latents, d_model], d_b_dec)."""
    dtype = torch.float64 if W_dec.dtype == torch.float64 else torch.float32
    arrays = [t.detach().to(dtype).contiguous().numpy() for t in (x, values, W_dec, b_dec, weights)]
    tiles = -(-x.shape[1] // TILE)
    d_values = torch.zeros(tiles, *values.shape, dtype=dtype)
    d_W, d_b = torch.zeros(W_dec.shape, dtype=dtype), torch.zeros(b_dec.shape, dtype=dtype)
    losses = torch.zeros(tiles, dtype=torch.float64)
    _prefixes(*arrays, _indices(indices), d_values.numpy(), d_W.numpy(), d_b.numpy(), losses.numpy())
    return losses.sum().to(dtype), d_values.sum(0), d_W, d_b


def scatter_rows(
    coefficients: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    x: Float[Tensor, "batch d_model"],
    latents: int,
) -> Float[Tensor, "latents d_model"]:
    """As `naive.scatter_rows`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.zeros(latents, x.shape[1], dtype=dtype)
    arrays = [t.detach().to(dtype).contiguous().numpy() for t in (coefficients, x)]
    _scatter(*arrays, _indices(indices), out.numpy())
    return out


def _indices(indices: Tensor) -> np.ndarray:
    return indices.detach().long().contiguous().numpy()


def _select_by_sorting(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = torch.relu(pre.detach()).sort(dim=1, descending=True, stable=True)
    broken = ~pre.isfinite().all(dim=1, keepdim=True)
    return torch.where(broken, torch.nan, values[:, :k]), indices[:, :k].contiguous()


@jit(parallel=True)
@no_type_check
def _select(bits, infinity, shift, k, groups, values, indices):
    """Works on the bits of bf16 or fp32 as integers: for numbers that are not negative, their order is the same.

    An entry's group is its index modulo `groups`. k groups have a maximum at or above the k-th largest maximum, so
    everything below that bound is out; what is left, a little over k entries, is sorted.
    """
    rows, columns = bits.shape
    zero, one = bits.dtype.type(0), bits.dtype.type(1)
    for row in nb.prange(rows):
        line = bits[row]
        maxima = np.zeros(groups, bits.dtype)
        lowest = zero
        for first in range(0, columns, groups):
            for g in range(min(groups, columns - first)):
                entry = line[first + g]
                maxima[g] = max(maxima[g], entry)
        for column in range(columns):  # negative as integers: smaller the further from zero, but for NaNs
            lowest = max(lowest, bits.dtype.type(line[column] & infinity))
        bound = zero  # the k-th largest maximum, from its highest bit down; numba's np.partition compiles for 10 s
        for place in range(8 * bits.itemsize - 2, -1, -1):
            higher = bits.dtype.type(bound | (one << place))
            above = 0
            for g in range(groups):
                above += maxima[g] >= higher
            if above >= k:
                bound = higher
        bound = max(one, bound)
        if lowest == infinity:  # an infinity, or a NaN, perhaps one with its sign set
            values[row, :] = NAN
            indices[row, :] = np.arange(k)
            continue
        found = np.empty(columns, np.uint64)
        count = 0
        for g in range(groups):
            if maxima[g] >= bound:
                for column in range(g, columns, groups):
                    if line[column] >= bound:
                        found[count] = (np.uint64(line[column]) << np.uint64(32)) | np.uint64(0xFFFFFFFF - column)
                        count += 1
        ordered = np.sort(found[:count])
        taken = min(k, count)
        for t in range(taken):
            key = ordered[count - 1 - t]
            values[row, t] = np.int32(key >> np.uint64(32)) << shift
            indices[row, t] = np.int64(0xFFFFFFFF) - np.int64(key & np.uint64(0xFFFFFFFF))
        column = 0
        for t in range(taken, k):  # fewer than k are positive: the rest are zeros, lowest index first
            while line[column] > 0:
                column += 1
            values[row, t] = 0
            indices[row, t] = column
            column += 1


@jit(parallel=True, fastmath=FAST)
@no_type_check
def _prefixes(x, values, W_dec, b_dec, weights, indices, d_values, d_W, d_b, losses):
    rows, width = x.shape
    k = values.shape[1]
    two, zero = W_dec.dtype.type(2), W_dec.dtype.type(0)
    for tile in nb.prange(losses.size):
        start = tile * TILE
        stop = min(width, start + TILE)
        size = stop - start
        residual, suffix = np.empty(size, x.dtype), np.empty(size, x.dtype)
        bias, d_bias = b_dec[start:stop], np.zeros(size, x.dtype)
        total = 0.0
        for row in range(rows):
            w = weights[row if weights.shape[0] > 1 else 0]
            target = x[row, start:stop]
            square = zero
            for c in range(size):
                moved = bias[c] - target[c]
                residual[c] = moved
                square += moved * moved
            total += w[0] * square
            lowest = 0 if w[0] != 0 else k + 1  # the shortest weighted prefix: below it the way down needs no residual
            for t in range(k):
                v = values[row, t]
                direction = W_dec[indices[row, t], start:stop]
                if w[t + 1] != 0:
                    square = zero
                    for c in range(size):
                        moved = residual[c] + v * direction[c]
                        residual[c] = moved
                        square += moved * moved
                    total += w[t + 1] * square
                    lowest = min(lowest, t + 1)
                elif v != 0:
                    for c in range(size):
                        residual[c] += v * direction[c]
            for c in range(size):
                suffix[c] = zero
            for t in range(k - 1, -1, -1):
                v = values[row, t]
                weight = two * w[t + 1]
                # Slices, because LLVM vectorises them: indexing in two dimensions was measured five times slower.
                direction, gradient = W_dec[indices[row, t], start:stop], d_W[indices[row, t], start:stop]
                along = zero
                if weight != 0:
                    for c in range(size):
                        suffix[c] += weight * residual[c]
                if t >= lowest:
                    for c in range(size):
                        along += suffix[c] * direction[c]
                        gradient[c] += v * suffix[c]
                        residual[c] -= v * direction[c]
                else:
                    for c in range(size):
                        along += suffix[c] * direction[c]
                        gradient[c] += v * suffix[c]
                d_values[tile, row, t] = along
            weight = two * w[0]
            for c in range(size):
                d_bias[c] += suffix[c] + weight * residual[c]
        for c in range(size):
            d_b[start + c] = d_bias[c]
        losses[tile] = total


@jit(parallel=True, fastmath=FAST)
@no_type_check
def _scatter(coefficients, x, indices, out):
    rows, width = x.shape
    for tile in nb.prange(-(-width // TILE)):
        start = tile * TILE
        stop = min(width, start + TILE)
        for row in range(rows):
            source = x[row, start:stop]
            for t in range(coefficients.shape[1]):
                factor = coefficients[row, t]
                if factor != 0:
                    target = out[indices[row, t], start:stop]
                    for c in range(stop - start):
                        target[c] += factor * source[c]
