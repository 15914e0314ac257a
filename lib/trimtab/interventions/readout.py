"""From the residual stream to logits, after any block as after the last; and the text of a token."""

import torch
from jaxtyping import Float, Int
from nnsight import TransformersModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trimtab.errors import InputError
from trimtab.interventions.model import blocks_of, device_of, final_norm, hidden_of

SLACK = 0.05
"""How far the last block's readout may be from the model's own logits, as a share of the largest: low precision."""


class Readout:
    """cap(unembedding(final_norm(h))), with the cap c tanh(logits / c) where the model's configuration has one."""

    def __init__(self, view: TransformersModel) -> None:
        self.view = view
        self.norm = final_norm(view)._module
        self.unembedding = view._module.get_output_embeddings()
        self.cap: float | None = getattr(view._module.config.get_text_config(), "final_logit_softcapping", None)

    @property
    def vocabulary(self) -> int:
        """Rows of the unembedding; some models have more than their tokenizer has tokens."""
        return self.unembedding.weight.shape[0]

    @torch.no_grad()
    def __call__(self, residual: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocabulary"]:
        """Logits, computed in the model's own dtype and returned in fp32."""
        logits = self.unembedding(self.norm(residual)).float()
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

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
                f"{type(self.view._module).__name__} does more between its last block and its logits than final norm, "
                "unembedding and final_logit_softcapping: the logit lens does not fit it."
            )
        return found


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token alone; one that is only part of a character in the tokenizer's own spelling."""
    text = str(tokenizer.decode([token]))
    return str(tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else text
