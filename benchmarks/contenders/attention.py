"""Attention as `benchmarks/rebased.py` compares it: each takes q, k [batch, time, heads, d_k], v [..., d_v].

`quadratic` and `cumulative` follow, line for line, what the peers' reference implementations compute (the whole matrix
of weights; the running sum of key features times values), since neither project's own kernels run on a CPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.rebased.kernels import REBASED, chunk, naive, step

EPS, SCALE = 1e-6, 16**-0.5


def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Ours."""
    return chunk.attention(q, k, v, REBASED, q.shape[-1] ** -0.5)[0]


def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Our readable definition."""
    return naive.attention(q, k, v, REBASED, q.shape[-1] ** -0.5)[0]


def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The T x T form, as in flash-linear-attention's `naive_parallel_rebased`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)) ** 2
    weights.masked_fill_(~torch.ones(weights.shape[-2:], dtype=torch.bool).tril(), 0)
    return (weights @ v / (weights.sum(dim=-1, keepdim=True) + EPS)).transpose(1, 2)


def cumulative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The running sum of phi(k) v^T at every token, as in zoology's `linear`, with the 136 features of the square."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    a, b = torch.triu_indices(q.shape[-1], q.shape[-1])
    weight = torch.where(a == b, 1.0, 2**0.5) * q.shape[-1] ** -0.5
    q, k = (x[..., a] * x[..., b] * weight for x in (q, k))
    sums = (q[..., None, :] * (k[..., None, :] * v[..., :, None]).cumsum(dim=2)).sum(dim=-1)
    return (sums / ((q * k.cumsum(dim=2)).sum(dim=-1, keepdim=True) + EPS)).transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's softmax attention; queries and keys filled up to the width of values, else it has no fused form."""
    q, k, v = (x.transpose(1, 2) for x in (_wide(q, v), _wide(k, v), v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE).transpose(1, 2)


def _wide(x: Tensor, v: Tensor) -> Tensor:
    return F.pad(x, (0, v.shape[-1] - x.shape[-1]))


class recurrent:
    """Ours: decoding with a carried state."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, steps: int) -> None:
        self.state = chunk.attention(q, k, v, REBASED, q.shape[-1] ** -0.5)[1]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return step(q, k, v, REBASED, q.shape[-1] ** -0.5, self.state)


class key_value_cache:
    """Softmax over all keys and values so far, which lie in memory made beforehand. With one query torch has no use for
    keys as wide as values: they are kept as they are."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, steps: int) -> None:
        self.time = k.shape[1]
        self.k, self.v = (F.pad(x.transpose(1, 2), (0, 0, 0, steps)).contiguous() for x in (k, v))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.k[:, :, self.time], self.v[:, :, self.time] = k, v
        self.time += 1
        with torch.no_grad():
            seen = self.k[:, :, : self.time], self.v[:, :, : self.time]
            return F.scaled_dot_product_attention(q[:, :, None], *seen, scale=SCALE)
