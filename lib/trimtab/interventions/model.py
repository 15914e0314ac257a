"""A loaded model under nnsight, and where its families keep their parts.

A *site* is the index of a decoder block, counted from 0; its activation is the residual stream after that block:
`hidden_states[site + 1]` of transformers, except for the last block, where transformers gives the state after the final
norm instead.
"""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
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
# What the norm between the last block and the unembedding is called, beside the blocks.
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


def wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TransformersModel:
    """Put a loaded model under nnsight. The model itself is not changed, nor is the caller's tokenizer."""
    # nnsight sets padding_side and pad_token on the tokenizer that it is given.
    return TransformersModel(model, task="text-generation", tokenizer=copy.deepcopy(tokenizer))


def device_of(wrapped: TransformersModel) -> torch.device:
    """Where the model's weights are, and its inputs must be."""
    return next(wrapped._module.parameters()).device


def blocks_of(wrapped: TransformersModel) -> Any:
    """The decoder blocks, as nnsight's envoys, in order."""
    return getattr(decoder_of(wrapped), _block_path(wrapped).rpartition(".")[2])


def decoder_of(wrapped: TransformersModel) -> Any:
    """What holds the decoder blocks, as nnsight's envoy."""
    return functools.reduce(getattr, _block_path(wrapped).split(".")[:-1], wrapped)


def _block_path(wrapped: TransformersModel) -> str:
    for path in BLOCK_PATHS:
        try:
            functools.reduce(getattr, path.split("."), wrapped)
        except AttributeError:
            continue
        return path
    raise InputError(
        f"{type(wrapped._module).__name__} keeps its decoder blocks in an unknown place; "
        f"known are {', '.join(BLOCK_PATHS)}."
    )


def final_norm(wrapped: TransformersModel) -> Any:
    """The norm between the last block and the unembedding, as nnsight's envoy."""
    for name in FINAL_NORMS:
        if (norm := getattr(decoder_of(wrapped), name, None)) is not None:
            return norm
    raise InputError(
        f"{type(wrapped._module).__name__} keeps its final norm in an unknown place; "
        f"known are {', '.join(FINAL_NORMS)}, beside the blocks."
    )


def attention_of(wrapped: TransformersModel) -> tuple[bool, int | None]:
    """(whether some layers attend to all earlier tokens, how many tokens the others attend to: None without such).

    Raises InputError for a model with layers of another kind: recurrent ones, and those that attend in chunks.
    """
    config = wrapped._module.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [FULL if window is None else SLIDING])
    if kinds - {FULL, SLIDING} or getattr(wrapped._module, "_is_stateful", False):
        kind = ", ".join(sorted(kinds - {FULL, SLIDING})) or "recurrent"
        raise InputError(
            f"{type(wrapped._module).__name__} has {kind} layers, which no mask can keep apart: only models that "
            "attend to all tokens, or within a window, can be used here."
        )
    return FULL in kinds, window if SLIDING in kinds else None


FULL, SLIDING = "full_attention", "sliding_attention"


def hidden_of(output: Tensor | tuple[Any, ...]) -> Tensor:
    """The residual stream in what a block returned."""
    # transformers 5 returns a tensor from a Llama block; other families still return a tuple.
    return output if isinstance(output, Tensor) else output[0]


def check_sites(sites: Sequence[int], count: int) -> None:
    """Raise InputError unless every site is a block of a model that has `count` of them, and there is one."""
    wrong = [site for site in sites if not 0 <= site < count]
    if wrong or not sites:
        raise InputError(f"site {wrong[0] if wrong else sites} is not a block of this model: 0 to {count - 1}.")
