"""One more token of every row through a Llama, without its module tree: what most of an update and of a reading is.

On a CPU a step of few rows is weights read, packed anew at each product, and many small operations around them; a step
of many rows is mostly keys and values repeated for each head. Here weights are packed once for as many steps as a
continuation has, the heads that share keys and values are one product, and nothing is called that does nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from trimtab.repetition.arms import PlainPolicy, SteeredPolicy
from trimtab.rl.cache import RoomyCache
from trimtab.rl.policy import FullPolicy, Policy


class LlamaStep:
    """Final hidden states and logits of rows that all stand at one position, as the policy's own model computes them
    but for rounding. Weights are those of the moment of building: build it anew after an update."""

    def __init__(self, model: LlamaForCausalLM, added: Float[Tensor, "layers d_model"] | None, rows: int) -> None:
        self.model, decoder = model, model.model
        self.head_dim: int = decoder.layers[0].self_attn.head_dim
        self.shared = model.config.num_attention_heads // decoder.layers[0].self_attn.num_key_value_groups
        """Heads of keys and values."""
        self.added = None if added is None else added.detach().to(model.dtype)
        self.norm = _Norm(decoder.norm)
        self.layers = [_Layer(block, rows) for block in decoder.layers]
        self.unembedding = _Product([model.lm_head], rows)

    @classmethod
    def of(cls, policy: Policy, rows: int) -> "LlamaStep | None":
        """For a policy known to compute what its model does, and vectors added after every block where it has them: a
        Llama without biases, on the CPU. None for all else: adapters, views that do something of their own, other
        families, other devices. `rows`: of most steps."""
        model = policy.view._module
        if not isinstance(policy, FullPolicy | PlainPolicy | SteeredPolicy) or policy.device.type != "cpu":
            return None
        if type(model) is not LlamaForCausalLM or model.config.hidden_act != "silu":
            return None
        linear = [part for name, part in model.named_modules() if name.endswith(("_proj", "lm_head"))]
        if any(type(part) is not nn.Linear or part.bias is not None for part in linear):
            return None
        return cls(model, policy.vectors if isinstance(policy, SteeredPolicy) else None, rows)

    @torch.no_grad()
    def hidden(self, ids: Int[Tensor, " rows"], position: int, cache: RoomyCache) -> Float[Tensor, "rows d_model"]:
        """After the final norm, of these tokens at this position; their keys and values join the cache."""
        x = self.model.model.embed_tokens(ids)
        angles = self.model.model.rotary_emb(x[:, None], torch.tensor([[position]]))
        cos, sin = (each[0, 0] for each in angles)
        half = self.head_dim // 2
        sin = torch.cat([-sin[:half], sin[half:]])  # the sign of rotate_half
        rows = len(ids)
        for i, layer in enumerate(self.layers):
            h = layer.before_attention(x)
            parts = layer.inward(h).view(rows, -1, self.head_dim)
            turned, v = parts[:, : -self.shared], parts[:, -self.shared :]
            turned = turned * cos + turned.roll(half, dims=-1) * sin
            q, k = turned[:, : -self.shared], turned[:, -self.shared :]
            keys, values = cache.update(k[:, :, None], v[:, :, None], i)
            # Heads that share keys and values stand where queries of several positions would.
            q = q.view(rows, self.shared, -1, self.head_dim)
            x = x + layer.outward(functional.scaled_dot_product_attention(q, keys, values).reshape(rows, -1))
            gate, up = layer.widen(layer.before_mlp(x)).chunk(2, dim=-1)
            x = x + layer.narrow(functional.silu(gate) * up)
            if self.added is not None:
                x = x + self.added[i]
        return self.norm(x)

    @torch.no_grad()
    def logits(self, hidden: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows vocab"]:
        """Of the next token, in the model's dtype."""
        return self.unembedding(hidden)


class _Layer:
    """Of a decoder block: its norms and its products."""

    def __init__(self, block: Any, rows: int) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.before_attention, self.before_mlp = _Norm(block.input_layernorm), _Norm(block.post_attention_layernorm)
        self.inward = _Product([attention.q_proj, attention.k_proj, attention.v_proj], rows)
        self.outward = _Product([attention.o_proj], rows)
        self.widen, self.narrow = _Product([mlp.gate_proj, mlp.up_proj], rows), _Product([mlp.down_proj], rows)


class _Product:
    """x W^T of layers that read the same x, as one, with W packed for oneDNN where that has bf16."""

    def __init__(self, parts: Sequence[nn.Linear], rows: int) -> None:
        weights = [part.weight.detach() for part in parts]
        self.weight, self.packed = weights[0] if len(weights) == 1 else torch.cat(weights), None
        if self.weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows)
            del self.weight

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return functional.linear(x, self.weight)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
        return product


class _Norm:
    """x / sqrt(mean(x^2) + epsilon), in fp32 and rounded, then weighted."""

    def __init__(self, part: Any) -> None:
        self.weight, self.epsilon = part.weight.detach(), part.variance_epsilon

    def __call__(self, x: Tensor) -> Tensor:
        # Five small operations; torch's own rms_norm takes twice their time here.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return self.weight * (x * (length * length / x.shape[-1] + self.epsilon).rsqrt()).to(x.dtype)
