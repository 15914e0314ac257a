"""The kernels on a GPU: Triton, nothing added atomically, so that the same inputs give the same bits.

With g_j = 2 w_j (x_hat_j - x) and S_t = sum over j >= t of g_j, as in `cpu`, there are two passes over the decoder's
columns. One program per row and tile of columns walks the latents up for the loss and down again for the gradients,
with residual and suffix in registers, and stores S_t. Then one program per feature and tile reduces

    dL/dW_dec[f] = sum over the pairs (row, t) with indices[row, t] = f of values[row, t] S_t[row]

over the pairs sorted by feature. S_t changes only where a prefix has a weight, so that a budget set J costs |J| stored
rows and not k; columns are worked through in slabs that hold no more than SUFFIX_BYTES of them. Everything is computed
and returned in fp32, whatever the inputs' dtypes.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

_F32 = torch.float32
SUFFIX_BYTES = 512 * 2**20
"""Of suffixes stored at a time. Slabs share no columns of x and W_dec: with more memory it would hardly be faster."""
NARROWEST, WIDEST = 32, 256
"""Columns to a tile: at least a 128-byte line of fp32; at most eight to a lane, since a warp works through each."""
PAIRS = 4
"""Rows in flight in the reduction. A feature has batch k / latents pairs on average: 2 to 8 at the sizes we train."""
CHUNK = 128
"""Pairs summed beforehand where all are of one feature. One that fires on every row of a batch of n would have its
program go through n / PAIRS dependent loads, 1 ms at n = 4096 while all the others need about that together; this way
it is at most 2 CHUNK / PAIRS, and n / CHUNK sums that do not depend on one another."""


def select(pre: Float[Tensor, "batch latents"], k: int) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """As `naive.select`, but of equals torch.topk keeps whichever it likes, in an order that it does not promise.

    Where fewer than k entries are positive the rest are zeros, of latents that are likewise left open.
    """
    values, indices = pre.detach().topk(k, dim=1)
    return torch.relu(values), indices  # ReLU keeps the order, and after the selection it need not write all of `pre`


def prefix_gradients(
    x: Float[Tensor, "batch d_model"],
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "latents d_model"],
    b_dec: Float[Tensor, " d_model"],
    weights: Float[Tensor, "rows prefixes"],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`naive.prefix_loss` and its gradients: (loss, d_values [batch, k], d_W_dec [latents, d_model], d_b_dec)."""
    x, W_dec, b_dec = (t.detach().contiguous() for t in (x, W_dec, b_dec))
    values, weights = (t.detach().float().contiguous() for t in (values, weights))
    indices = indices.detach().int().contiguous()
    (batch, k), (latents, d_model) = values.shape, W_dec.shape
    assert weights.shape in ((1, k + 1), (batch, k + 1))  # the kernel would read beyond them
    weighted = (weights[:, 1:] != 0).any(dim=0)
    stored = max(1, int(weighted.sum()))  # waits for the device: what is allocated depends on it
    block, width = _slab(batch * stored, d_model)
    tiles = triton.cdiv(d_model, block)
    losses, d_values = x.new_empty(tiles, batch, dtype=_F32), x.new_empty(tiles, batch, k, dtype=_F32)
    d_W, d_b = x.new_empty(latents, d_model, dtype=_F32), x.new_empty(d_model, dtype=_F32)
    suffixes, d_bias = x.new_empty(batch * stored, width, dtype=_F32), x.new_empty(batch, width, dtype=_F32)
    places, pairs = _places(weighted, stored, values, indices, latents)
    with torch.cuda.device_of(x):
        for first in range(0, d_model, width):
            columns = min(width, d_model - first)
            _walk[batch, triton.cdiv(columns, block)](
                x, values, indices, W_dec, b_dec, weights, places, losses, d_values, d_bias, suffixes,
                k, d_model, first, width, stored, k + 1 if len(weights) > 1 else 0, BLOCK=block, num_warps=1,
            )  # fmt: skip
            _reduce(suffixes, pairs, d_W, first, columns, block)
            d_b[first : first + columns] = d_bias[:, :columns].sum(dim=0)
    return losses.sum(dtype=torch.float64).float(), d_values.sum(dim=0), d_W, d_b


def scatter_rows(
    coefficients: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    x: Float[Tensor, "batch d_model"],
    latents: int,
) -> Float[Tensor, "latents d_model"]:
    """As `naive.scatter_rows`, in fp32."""
    x = x.detach().contiguous()
    d_model = x.shape[1]
    out = x.new_empty(latents, d_model, dtype=_F32)
    rows = torch.arange(len(x), dtype=torch.int32, device=x.device)[:, None]
    pairs = _by_feature(coefficients.detach().float(), indices, rows, latents)
    with torch.cuda.device_of(x):
        _reduce(x, pairs, out, 0, d_model, _slab(0, d_model)[0])
    return out


class _Pairs(NamedTuple):
    """All (row, rank) in the order of their features, those of one feature in the order of the batch."""

    features: Int[Tensor, " pairs"]
    offsets: Int[Tensor, " latents_and_one"]
    """Where in the list each feature's pairs begin, and at last its length."""
    sources: Int[Tensor, " pairs"]
    """Which of the rows to be added a pair stands for."""
    coefficients: Float[Tensor, " pairs"]
    """What it is multiplied by; where that is zero it is not read."""


def _by_feature(coefficients: Tensor, indices: Tensor, sources: Tensor, latents: int) -> _Pairs:
    features, order = indices.detach().int().flatten().sort(stable=True)
    starts = torch.arange(latents + 1, dtype=torch.int32, device=indices.device)
    offsets = torch.searchsorted(features, starts, out_int32=True)
    return _Pairs(features, offsets, sources.expand_as(indices).flatten()[order], coefficients.flatten()[order])


def _places(
    weighted: Bool[Tensor, " k"], stored: int, values: Tensor, indices: Tensor, latents: int
) -> tuple[Int[Tensor, " k"], _Pairs]:
    """Where a row's walk stores S_t, -1 where it is that of the next rank; and the pairs that read it from there."""
    place = weighted.cumsum(0, dtype=torch.int32) - weighted.int()  # of the first weighted prefix at or above a rank
    beyond = place >= weighted.sum()  # no prefix at or above has a weight: S_t = 0, and is not stored
    rows = torch.arange(len(values), dtype=torch.int32, device=values.device)[:, None]
    sources = rows * stored + place.clamp(max=stored - 1)
    pairs = _by_feature(values.masked_fill(beyond, 0), indices, sources, latents)
    return torch.where(weighted, place, -1), pairs


def _slab(rows: int, d_model: int) -> tuple[int, int]:
    """(columns of a tile, of a slab): slabs of equal numbers of tiles, at least one, in which `rows` fit the budget."""
    fitting = SUFFIX_BYTES // (4 * max(1, rows))
    block = max(NARROWEST, min(WIDEST, triton.next_power_of_2(d_model)))
    while block > max(NARROWEST, fitting):
        block //= 2
    tiles = triton.cdiv(d_model, block)
    slabs = triton.cdiv(tiles, max(1, fitting // block))
    return block, triton.cdiv(tiles, slabs) * block


def _reduce(rows: Tensor, pairs: _Pairs, out: Tensor, first: int, columns: int, block: int) -> None:
    """out[f, first : first + columns] = sum over the pairs of f of coefficient rows[source, :columns]."""
    chunks, stride = len(pairs.features) // CHUNK, rows.shape[1]
    sums = rows.new_empty(chunks, stride, dtype=_F32)
    constants = {"CHUNK": CHUNK, "PAIRS": PAIRS, "BLOCK": block, "num_warps": 1}
    features, offsets, *terms = pairs
    tiles = triton.cdiv(columns, block)
    _reduce_chunks[chunks, tiles](rows, *terms, features, sums, stride, columns, **constants)
    _reduce_features[len(out), tiles](
        rows, *terms, offsets, sums, out, stride, columns, first, out.shape[1], **constants
    )


# The type checker of the tests must not wrap what Triton compiles, hence no_type_check.


@triton.jit
@no_type_check
def _walk(
    x, values, indices, W_dec, b_dec, weights, places, losses, d_values, d_bias, suffixes,
    k, d_model, first, width, stored, weight_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss, d_values and d_b_dec of a row in a tile of columns, and its suffixes [stored, width]."""
    row = tl.program_id(0).to(tl.int64)  # offsets into W_dec and the suffixes do not fit 32 bits
    local = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = first + local
    inside = columns < d_model
    part = (first // BLOCK + tl.program_id(1)) * tl.num_programs(0) + row  # of the partial sums over tiles
    values += row * k
    indices += row * k
    weights += row * weight_stride
    d_values += part * k
    target = tl.load(x + row * d_model + columns, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(b_dec + columns, mask=inside, other=0.0).to(tl.float32) - target
    nothing = tl.load(weights)
    loss = nothing * residual * residual
    for t in tl.range(0, k, loop_unroll_factor=4):  # so that loads of several directions are in flight
        direction = _direction(W_dec, indices + t, d_model, columns, inside)
        residual += tl.load(values + t) * direction
        loss += tl.load(weights + t + 1) * residual * residual
    tl.store(losses + part, tl.sum(loss, 0))
    suffix = tl.full([BLOCK], 0.0, tl.float32)
    direction = _direction(W_dec, indices + k - 1, d_model, columns, inside)
    for step in range(k):
        t = k - 1 - step
        # Everything is loaded before anything is stored, and the next direction with it: no load passes a store.
        below = _direction(W_dec, indices + tl.maximum(t - 1, 0), d_model, columns, inside)
        value, weight, place = tl.load(values + t), tl.load(weights + t + 1), tl.load(places + t)
        suffix += 2 * weight * residual
        residual -= value * direction
        tl.store(d_values + t, tl.sum(suffix * direction, 0))
        kept = inside & (place + tl.zeros([BLOCK], tl.int32) >= 0)  # Triton 3.9 takes no mask of a scalar and a block
        tl.store(suffixes + (row * stored + place) * width + local, suffix, mask=kept)
        direction = below
    tl.store(d_bias + row * width + local, suffix + 2 * nothing * residual, mask=inside)


@triton.jit
@no_type_check
def _direction(W_dec, index, d_model, columns, inside):
    """[BLOCK] of the decoder's row that `index` points to the number of."""
    feature = tl.load(index).to(tl.int64)
    return tl.load(W_dec + feature * d_model + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _sum_pairs(total, rows, sources, coefficients, start, stop, stride, local, inside, PAIRS: tl.constexpr):
    """total [BLOCK] plus the rows of pairs start .. stop - 1, each times its coefficient."""
    for begin in range(start, stop, PAIRS):
        pair = begin + tl.arange(0, PAIRS)
        coefficient = tl.load(coefficients + pair, mask=pair < stop, other=0.0)
        source = tl.load(sources + pair, mask=pair < stop, other=0).to(tl.int64)
        wanted = (coefficient != 0)[:, None] & inside[None, :]
        row = tl.load(rows + source[:, None] * stride + local[None, :], mask=wanted, other=0.0).to(tl.float32)
        total += tl.sum(coefficient[:, None] * row, 0)
    return total


@triton.jit
@no_type_check
def _reduce_chunks(
    rows, sources, coefficients, features, sums, stride, columns,
    CHUNK: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums[c] [stride] of the pairs c CHUNK .. (c + 1) CHUNK - 1, where these are of one feature."""
    chunk = tl.program_id(0)
    start = chunk * CHUNK
    if tl.load(features + start) == tl.load(features + start + CHUNK - 1):
        local = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = local < columns
        total = tl.full([BLOCK], 0.0, tl.float32)
        stop = start + CHUNK
        total = _sum_pairs(total, rows, sources, coefficients, start, stop, stride, local, inside, PAIRS)
        tl.store(sums + chunk.to(tl.int64) * stride + local, total, mask=inside)


@triton.jit
@no_type_check
def _reduce_features(
    rows, sources, coefficients, offsets, sums, out, stride, columns, first, d_model,
    CHUNK: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[feature]: its pairs up to the first whole chunk, the sums of its whole chunks, its pairs after the last."""
    feature = tl.program_id(0)
    local = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = local < columns
    start, stop = tl.load(offsets + feature), tl.load(offsets + feature + 1)
    whole = tl.minimum(stop, (start + CHUNK - 1) // CHUNK * CHUNK)
    rest = tl.maximum(whole, stop // CHUNK * CHUNK)
    total = tl.full([BLOCK], 0.0, tl.float32)
    total = _sum_pairs(total, rows, sources, coefficients, start, whole, stride, local, inside, PAIRS)
    sums += (whole // CHUNK).to(tl.int64) * stride
    for _ in range(whole // CHUNK, rest // CHUNK):
        total += tl.load(sums + local, mask=inside, other=0.0)
        sums += stride
    total = _sum_pairs(total, rows, sources, coefficients, rest, stop, stride, local, inside, PAIRS)
    tl.store(out + feature.to(tl.int64) * d_model + first + local, total, mask=inside)
