"""The only door to nnsight: wrap a loaded model, and read its residual stream.

A *site* is the index of a decoder block, counted from 0; its activation is the residual stream after that block:
`hidden_states[site + 1]` of transformers, except for the last block, where transformers gives the state after the final
norm instead. Traces live here, in importable functions, because nnsight re-reads the
source of the code that opens a trace.
"""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from nnsight import TransformersModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab.errors import InputError

# Where the families of transformers keep their decoder blocks.
BLOCK_PATHS = (
    "model.layers",
    "model.language_model.layers",
    "transformer.h",
    "gpt_neox.layers",
    "model.decoder.layers",
)


def wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TransformersModel:
    """Put a loaded model under nnsight. The model itself is not changed, nor is the caller's tokenizer."""
    # nnsight sets padding_side and pad_token on the tokenizer that it is given.
    return TransformersModel(model, task="text-generation", tokenizer=copy.deepcopy(tokenizer))


def capture(
    wrapped: TransformersModel,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Int[Tensor, "batch seq"],
    sites: Sequence[int],
) -> dict[int, Float[Tensor, "batch seq d_model"]]:
    """Residual stream at several sites from one forward pass, which stops after the deepest of them.

    Activations come in the model's own dtype, detached, on its device. Raises InputError for a site that the model
    does not have.
    """
    blocks = _blocks(wrapped)
    wrong = [site for site in sites if not 0 <= site < len(blocks)]
    if wrong or not sites:
        raise InputError(f"site {wrong[0] if wrong else sites} is not a block of this model: 0 to {len(blocks) - 1}.")
    inputs = {"input_ids": input_ids}
    if not bool(attention_mask.all()):  # without padding, attention may take its faster causal path
        inputs["attention_mask"] = attention_mask
    chosen = [blocks[site] for site in sites]
    deepest = blocks[max(sites)]
    with torch.inference_mode(), wrapped.trace(inputs) as tracer:
        cache = tracer.cache(modules=chosen, device=None).save()
        deepest.output  # noqa: B018 (wait for this block, then leave the forward)
        tracer.stop()
    return {site: _hidden(cache[block.path].output) for site, block in zip(sites, chosen, strict=True)}


def device_of(wrapped: TransformersModel) -> torch.device:
    """Where the model's weights are, and its inputs must be."""
    return next(wrapped._module.parameters()).device


def _blocks(wrapped: TransformersModel) -> Any:
    for path in BLOCK_PATHS:
        try:
            return functools.reduce(getattr, path.split("."), wrapped)
        except AttributeError:
            continue
    raise InputError(
        f"{type(wrapped._module).__name__} keeps its decoder blocks in an unknown place; "
        f"known are {', '.join(BLOCK_PATHS)}."
    )


def _hidden(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    # transformers 5 returns a tensor from a Llama block; other families still return a tuple.
    return output if isinstance(output, Tensor) else output[0]
