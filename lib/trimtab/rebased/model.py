"""A language model of alternating mixers, as in zoology and Based: pre-norm blocks, tied embeddings."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.checkpoint import atomic, load_tensors, save_tensors, write_json
from trimtab.errors import InputError
from trimtab.rebased.mixers import ARMS, BaseConv, Cache, Mask, PolynomialAttention
from trimtab.rebased.softmax import SoftmaxAttention

MIXERS = ("conv", "softmax", "window", *ARMS)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a language model."""

    vocabulary: int
    """Tokens."""
    d_model: int = 64
    """Width of the residual stream."""
    mixers: tuple[str, ...] = ("conv", "rebased")
    """One for each block: names of `MIXERS`."""
    heads: int = 1
    """Of every attention."""
    d_k: int = 16
    """Width of queries and keys of polynomial attention, per head; d_k (d_k + 1) / 2 features."""
    d_v: int | None = None
    """Width of its values; None: d_model / heads."""
    window: int = 64
    """Of `window` mixers, in tokens."""
    mlp: int = 0
    """Width of the gated MLP after each mixer; 0: none, as in MQAR."""
    positions: int = 0
    """Learnt absolute positions, which longer rows do not fit; 0: none, and rotary ones in softmax."""
    dropout: float = 0.0
    """Of embeddings."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.mixers if name not in MIXERS]:
            raise InputError(f"{unknown[0]!r} is not a mixer: write any of {', '.join(MIXERS)}.")
        if not self.mixers or min(self.vocabulary, self.d_model, self.heads, self.d_k, self.window) < 1:
            raise InputError("A model has at least one mixer, and positive sizes.")


class LanguageModel(nn.Module):
    """Token ids to logits. `cache`, made by `empty_cache`, carries every mixer's state between calls."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.d_model)
        self.positions = nn.Embedding(config.positions, config.d_model) if config.positions else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(name, config) for name in config.mixers)
        self.norm = nn.LayerNorm(config.d_model)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, ids: Int[Tensor, "batch time"], mask: Mask = None, cache: "list[Cache] | None" = None
    ) -> Float[Tensor, "batch time vocabulary"]:
        """Logits at every token; `mask` is False at padding, which stands on the left."""
        return self.unembed(self.hidden(ids, mask, cache))

    def hidden(
        self, ids: Int[Tensor, "batch time"], mask: Mask = None, cache: "list[Cache] | None" = None
    ) -> Float[Tensor, "batch time d_model"]:
        """What the unembedding reads: where few logits are wanted, `unembed` these alone."""
        x = self.embedding(ids)
        if self.positions is not None:
            x = x + self.positions(self._places(ids, mask, cache))
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, mask, None if cache is None else cache[i])
        return self.norm(x)

    def unembed(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocabulary"]:
        """Logits of hidden states: the embedding's transpose."""
        return hidden @ self.embedding.weight.T

    def empty_cache(self) -> list[Cache]:
        """Of a sequence that has not begun."""
        return [{} for _ in self.blocks]

    def _places(self, ids: Tensor, mask: Mask, cache: "list[Cache] | None") -> Tensor:
        """Which position each token has; padding has the first, where nobody looks."""
        if mask is None and cache is None:
            longest, places = ids.shape[1], torch.arange(ids.shape[1], device=ids.device)
        else:
            places = (torch.ones_like(ids) if mask is None else mask.long()).cumsum(1) - 1
            if cache is not None:
                places = places + cache[0].get("places", places.new_zeros(len(ids), 1))
                cache[0]["places"] = places[:, -1:] + 1
            longest, places = int(places.max()) + 1, places.clamp(min=0)
        if longest > self.config.positions:
            raise InputError(
                f"The model has {self.config.positions} positions: a row of {longest} tokens does not fit."
            )
        return places

    def state_size(self) -> int:
        """Numbers that a polynomial attention carries from token to token, the whole model: features x (d_v + 1). The
        last of them, kept to twice the digits, counts once."""
        return sum(
            mixer.heads * mixer.polynomial.features(mixer.d_k) * (mixer.d_v + 1)
            for mixer in self.modules()
            if isinstance(mixer, PolynomialAttention)
        )

    def save(self, folder: Path) -> None:
        """Weights as `model.safetensors`, and the shape as `config.json`."""
        with atomic(folder, "language-model") as partial:
            partial.mkdir(parents=True)
            save_tensors(partial / "model.safetensors", self.state_dict())
            write_json(partial / "config.json", asdict(self.config))

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "LanguageModel":
        """What `save` wrote. Raises InputError where the folder does not hold it."""
        try:
            found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            config = ModelConfig(**{**found, "mixers": tuple(found["mixers"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{folder} holds no language model of this project ({error}).") from error
        model = cls(config)
        model.load_state_dict(load_tensors(folder / "model.safetensors")[0])
        return model.to(device).eval()


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, name: str, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.mixer = make_mixer(name, config)
        self.mlp = GatedMLP(config.d_model, config.mlp) if config.mlp else None

    def forward(self, x: Tensor, mask: Mask = None, cache: Cache | None = None) -> Tensor:
        """[batch, time, d_model] to the same."""
        x = x + self.mixer(self.norm(x), mask, cache)
        return x if self.mlp is None else x + self.mlp(x)


class GatedMLP(nn.Module):
    """W_out (silu(W_gate x) * W_in x) of the normalised x (SwiGLU, Shazeer 2020)."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.wide = nn.Linear(d_model, 2 * width, bias=False)
        self.out = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, d_model] to the same."""
        gate, value = self.wide(self.norm(x)).chunk(2, dim=-1)
        return self.out(nn.functional.silu(gate) * value)


def make_mixer(name: str, config: ModelConfig) -> nn.Module:
    """One of `MIXERS`."""
    if name == "conv":
        return BaseConv(config.d_model)
    if name in ("softmax", "window"):
        window = config.window if name == "window" else None
        return SoftmaxAttention(config.d_model, config.heads, window, rotary=not config.positions)
    return PolynomialAttention(config.d_model, config.heads, config.d_k, config.d_v, arm=name)


def hybrid(kind: str, depth: int, *, window_every: int = 0) -> Sequence[str]:
    """Based's pattern: convolutions with `kind` at every second block, and a window at every `window_every`-th of
    those."""
    mixers = []
    for i in range(depth):
        attention = i % 2 == 1
        windowed = attention and window_every and (i // 2) % window_every == window_every - 1
        mixers.append("window" if windowed else kind if attention else "conv")
    return mixers
