"""Add vectors to the residual stream, and read the final hidden states, with gradients."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from nnsight import TransformersModel
from torch import Tensor
from transformers.cache_utils import Cache

from trimtab.errors import InputError
from trimtab.interventions.model import blocks_of, check_sites, final_norm, hidden_of

# `steer` loops over however many steps there are, which ends "by design" with a warning at every forward pass.
warnings.filterwarnings("ignore", message=".*tracer.all.*loop ends this way by design", category=UserWarning)

Place = Literal["block", "mlp", "attention"]
"""Where in a block a vector is added: after the block, or to what its MLP or its attention writes into the stream."""


def steer(
    wrapped: TransformersModel,
    layers: Sequence[int],
    vectors: Callable[[], Float[Tensor, "layers d_model"]],
    place: Place = "block",
) -> TransformersModel:
    """A view of the model that adds vectors()[i] at `layers[i]` to every position, the prompt's included.

    `vectors` is called in every forward pass, of a trace and of a decoding step alike, so that the view follows
    training, and gradients reach what it reads. The model itself, and the view it came from, stay as they are.
    Raises InputError for a layer that the model does not have.
    """
    blocks = blocks_of(wrapped)
    check_sites(layers, len(blocks))
    if len(set(layers)) != len(layers):
        raise InputError(f"layers must be distinct, not {list(layers)}.")
    # nnsight wants modules in the order in which they run.
    order = sorted(range(len(layers)), key=lambda i: layers[i])
    parts = [(i, _part(blocks[layers[i]], place)) for i in order]
    with wrapped.edit() as (tracer, view):
        for _ in tracer.all():  # every step of a generation; a trace has one
            added = vectors()
            for i, part in parts:
                output = part.output
                hidden = hidden_of(output)
                moved = hidden + added[i].to(hidden.dtype)
                part.output = moved if isinstance(output, Tensor) else (moved, *output[1:])
    return view


def final_hidden(
    wrapped: TransformersModel,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Tensor,
    position_ids: Int[Tensor, "batch seq"],
    cache: Cache | None = None,
) -> Float[Tensor, "batch seq d_model"]:
    """Hidden states after the final norm, with gradients where they are enabled; the unembedding does not run.

    `attention_mask`: [batch, keys] of 0 and 1, or [batch, 1, seq, keys] of booleans for any pattern. With a `cache`
    the keys and values of earlier positions are read from it and those of these are added to it.
    """
    if attention_mask.dim() == 4 and wrapped._module.config._attn_implementation == "eager":
        # Which adds its mask: booleans would count as 0 and 1.
        dtype = wrapped._module.dtype
        attention_mask = torch.where(attention_mask, 0.0, torch.finfo(dtype).min).to(dtype)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    options = {} if cache is None else {"past_key_values": cache}
    with wrapped.trace(inputs, use_cache=cache is not None, **options) as tracer:
        hidden = final_norm(wrapped).output.save()
        tracer.stop()
    return hidden


def _part(block: Any, place: Place) -> Any:
    name = {"block": "", "mlp": "mlp", "attention": "self_attn"}[place]
    if name and not hasattr(block, name):
        raise InputError(f"the blocks of this model have no part {name!r}: add vectors at `block`.")
    return getattr(block, name) if name else block
