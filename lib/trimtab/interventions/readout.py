"""From hidden states to the model's own logits, after the last block or after any; and the text of a token."""

from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from nnsight import TransformersModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trimtab.errors import InputError
from trimtab.interventions.model import blocks_of, device_of, final_norm, hidden_of
from trimtab.interventions.steering import final_hidden

SLACK = 0.05
"""How far the last block's readout may be from the model's own logits, as a share of the largest: low precision."""


class Head:
    """From the states after the final norm to the model's own logits: the unembedding with its bias, then what the
    family does to them. Granite divides by `logits_scaling`, Cohere multiplies by `logit_scale`, Gemma caps them at
    c = `final_logit_softcapping`, c tanh(logits / c)."""

    def __init__(self, view: TransformersModel) -> None:
        """Raises InputError for a model that does something else with its logits."""
        config = view._module.config.get_text_config()
        self.unembedding: Any = view._module.get_output_embeddings()
        self.scale: float = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
        """What the unembedding's output is multiplied by."""
        self.cap: float | None = getattr(config, "final_logit_softcapping", None)
        if view._module not in _KNOWN:
            self._check(view)
            _KNOWN.add(view._module)

    def __call__(self, hidden: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocabulary"]:
        """In the model's own dtype, with gradients where they are enabled."""
        logits = self.unembedding(hidden)
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    @torch.no_grad()
    def _check(self, view: TransformersModel) -> None:
        ids = torch.arange(4, device=device_of(view))[None] % view._module.config.get_text_config().vocab_size
        own = view._module(input_ids=ids, use_cache=False).logits
        model = TransformersModel(view._module, task="text-generation", tokenizer=view.tokenizer)  # without edits
        found = self(final_hidden(model, ids, torch.ones_like(ids), torch.arange(4, device=ids.device)[None]))
        if found.shape != own.shape or not (found - own).abs().max() <= SLACK * own.abs().max():
            raise InputError(
                f"{type(view._module).__name__} does more between its final norm and its logits than unembedding, "
                "logits_scaling, logit_scale and final_logit_softcapping: its logits cannot be formed here."
            )


_KNOWN: WeakSet[nn.Module] = WeakSet()
"""Models whose logits `Head` is known to form."""


class Readout:
    """The logit lens: head(final_norm(h)), with the model's own `Head`."""

    def __init__(self, view: TransformersModel) -> None:
        self.view = view
        self.norm = final_norm(view)._module
        self.head = Head(view)
        self.unembedding = self.head.unembedding

    @property
    def vocabulary(self) -> int:
        """Rows of the unembedding; some models have more than their tokenizer has tokens."""
        return self.unembedding.weight.shape[0]

    @torch.no_grad()
    def __call__(self, residual: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocabulary"]:
        """Logits, computed in the model's own dtype and returned in fp32."""
        return self.head(self.norm(residual)).float()

    def residuals(
        self, input_ids: Int[Tensor, "batch seq"], attention_mask: Int[Tensor, "batch seq"]
    ) -> list[Float[Tensor, "batch seq d_model"]]:
        """The residual stream after each block, from one pass, with what a view adds there.

        Raises InputError where the readout of the last is not what the model itself predicts.
        """
        blocks = blocks_of(self.view)
        device = device_of(self.view)
        inputs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
        with torch.inference_mode(), self.view.trace(inputs, use_cache=False) as tracer:
            cache = tracer.cache(modules=list(blocks), device=None).save()
            logits = self.view.output.logits[:, -1].save()
        found = [hidden_of(cache[block.path].output) for block in blocks]
        error = (self(found[-1][:, -1]) - logits.float()).abs().max()
        if not error <= SLACK * logits.abs().max():
            raise InputError(
                f"{type(self.view._module).__name__} does more between its last block and its logits than final norm "
                "and head: the logit lens does not fit it."
            )
        return found


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token alone; one that is only part of a character in the tokenizer's own spelling."""
    text = str(tokenizer.decode([token]))
    return str(tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else text
