"""Causal softmax attention, over everything or over a sliding window: the ceiling, and the hybrid's short range."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trimtab.errors import InputError
from trimtab.rebased.mixers import Cache, Mask, Sequences

BASE = 10_000.0
"""Of the rotary angles (Su et al. 2021)."""


class SoftmaxAttention(nn.Module):
    """Multi-head attention; with `window` w a token sees itself and the w - 1 before it, in time O(time w)."""

    def __init__(self, d_model: int, heads: int = 1, window: int | None = None, *, rotary: bool = False) -> None:
        super().__init__()
        if d_model % heads or (rotary and d_model // heads % 2):
            raise InputError(f"{heads} heads do not divide d_model = {d_model} into heads of {'even ' * rotary}width.")
        if window is not None and window < 1:
            raise InputError(f"A window holds at least the token itself, not {window}.")
        self.heads, self.window, self.rotary = heads, window, rotary
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Sequences, mask: Mask = None, cache: Cache | None = None) -> Sequences:
        """See `mixers`. The cache holds keys and values: of the window, or of everything."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask.bool()
        start = 0
        if cache is not None:
            start = int(cache["time"]) if "time" in cache else 0
        if self.rotary:  # by place in the padded row: only differences count
            places = torch.arange(start, start + x.shape[1], device=x.device)
            q, k = rotated(q, places), rotated(k, places)
        if cache is not None:
            if "k" in cache:
                k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
                seen = torch.cat([cache["seen"], seen], dim=1)
            keep = slice(None) if self.window is None else slice(max(0, k.shape[2] - self.window + 1), None)
            cache["time"] = torch.tensor(start + x.shape[1])
            cache["k"], cache["v"], cache["seen"] = k[:, :, keep], v[:, :, keep], seen[:, keep]
        if self.window is not None and k.shape[2] > 2 * self.window and k.shape[2] == q.shape[2]:
            mixed = _in_blocks(q, k, v, seen, self.window)
        elif self.window is None and mask is None and k.shape[2] == q.shape[2]:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=_who_sees(q, k, seen, self.window))
        return self.out(mixed.transpose(1, 2).flatten(2))


def rotated(x: Float[Tensor, "batch heads time width"], places: Tensor) -> Float[Tensor, "batch heads time width"]:
    """Pairs of coordinates turned by angles in proportion to the place."""
    half = x.shape[-1] // 2
    angles = places[:, None] * BASE ** (-torch.arange(half, device=x.device) / half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def _who_sees(q: Tensor, k: Tensor, seen: Bool[Tensor, "batch keys"], window: int | None) -> Tensor:
    """[batch, 1, queries, keys]. A token of padding sees itself, for a softmax over nothing is NaN."""
    queries, keys = q.shape[2], k.shape[2]
    back = torch.arange(keys - queries, keys, device=q.device)[:, None] - torch.arange(keys, device=q.device)
    allowed = (back >= 0) & (back < (window or keys + 1))
    return (allowed & seen[:, None, None, :]) | (back == 0)


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, seen: Bool[Tensor, "batch time"], window: int) -> Tensor:
    """Blocks of `window` queries, each against its own block of keys and the one before."""
    batch, _, time, _ = q.shape
    blocks = -(-time // window)
    q, k, v = (F.pad(x, (0, 0, 0, blocks * window - time)).unflatten(2, (blocks, window)) for x in (q, k, v))
    seen = F.pad(seen, (0, blocks * window - time)).unflatten(1, (blocks, window))

    def pairs(x: Tensor, axis: int) -> Tensor:
        before = torch.cat([torch.zeros_like(x.narrow(axis, 0, 1)), x.narrow(axis, 0, blocks - 1)], dim=axis)
        return torch.cat([before, x], dim=axis + 1)

    back = torch.arange(window, device=q.device)[:, None] + window - torch.arange(2 * window, device=q.device)
    allowed = ((back >= 0) & (back < window) & pairs(seen, 1)[:, :, None, :]) | (back == 0)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, pairs(k, 2), pairs(v, 2)))  # batch * blocks first
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed.flatten(0, 1)[:, None])
    return mixed.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :time]
