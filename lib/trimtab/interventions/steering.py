"""Add vectors to the residual stream, and read the final hidden states, with gradients."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from nnsight import TransformersModel
from torch import Tensor
from transformers.cache_utils import Cache

from trimtab.errors import InputError
from trimtab.interventions.model import (
    FULL,
    SLIDING,
    attention_of,
    blocks_of,
    check_sites,
    decoder_of,
    final_norm,
    hidden_of,
)

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
    The sum is taken in fp32; what rounding to a model's 16 bits takes from it, which of a small vector may be nearly
    all, is added at the next of `layers`.
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
            added, owed = vectors(), None
            for i, part in parts:
                owed = _add(part, added[i], owed)
    root, additions = additions_of(wrapped)
    _ADDITIONS[view] = root, (*additions, Addition(tuple(layers), vectors, place))
    return view


class Addition(NamedTuple):
    """What one call of `steer` adds."""

    layers: tuple[int, ...]
    vectors: Callable[[], Float[Tensor, "layers d_model"]]
    place: Place


_ADDITIONS: WeakKeyDictionary[TransformersModel, tuple[TransformersModel, tuple[Addition, ...]]] = WeakKeyDictionary()


def additions_of(view: TransformersModel) -> tuple[TransformersModel, tuple[Addition, ...]]:
    """The model without what `steer` added to it, and that: where a pass is stopped, or begun, at some block, the
    additions that it does not come to must not be waited for."""
    return _ADDITIONS.get(view, (view, ()))


def add_at(
    blocks: Any, layer: int, additions: Sequence[Addition], added: Sequence[Tensor], owed: list[Tensor | None]
) -> None:
    """Within a trace: make the additions at one layer, in the order in which its parts run. `owed` has what rounding
    took from each at the layers before, None at the first, and is brought up to date."""
    for place in get_args(Place)[::-1]:
        for i, (addition, vectors) in enumerate(zip(additions, added, strict=True)):
            if addition.place == place and layer in addition.layers:
                owed[i] = _add(_part(blocks[layer], place), vectors[addition.layers.index(layer)], owed[i])


def _add(part: Any, vector: Tensor, owed: Tensor | None) -> Tensor | None:
    """Add a vector, and what earlier ones are `owed`; returns what rounding took."""
    output = part.output
    hidden = hidden_of(output)
    exact = hidden + vector.to(torch.promote_types(hidden.dtype, torch.float32))
    if owed is not None:
        exact = exact + owed
    moved = exact.to(hidden.dtype)
    part.output = moved if isinstance(output, Tensor) else (moved, *output[1:])
    return None if moved.dtype == exact.dtype else (exact - moved).detach()


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
    pattern = attention_mask if attention_mask.dim() == 2 else _patterns(wrapped, attention_mask, position_ids)
    one = pattern[FULL] if isinstance(pattern, dict) else pattern
    inputs = {"input_ids": input_ids, "attention_mask": one, "position_ids": position_ids}
    options = {} if cache is None else {"past_key_values": cache}
    with _given(wrapped, pattern), wrapped.trace(inputs, use_cache=cache is not None, **options) as tracer:
        hidden = final_norm(wrapped).output.save()
        tracer.stop()
    return hidden


@contextmanager
def _given(wrapped: TransformersModel, pattern: Tensor | dict[str, Tensor]) -> Iterator[None]:
    """Hand the decoder a mask for each kind of its layers, which nnsight's inputs have no place for."""
    if not isinstance(pattern, dict):
        yield
        return

    def swap(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"attention_mask": pattern}

    hook = decoder_of(wrapped)._module.register_forward_pre_hook(swap, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _patterns(
    wrapped: TransformersModel, allowed: Bool[Tensor, "batch 1 seq seq"], position_ids: Int[Tensor, "batch seq"]
) -> Tensor | dict[str, Tensor]:
    """A pattern of attention as the model takes it: narrowed to the window of the layers that have one."""
    full, window = attention_of(wrapped)
    masks = {FULL: allowed}
    if window is not None:
        near = (position_ids[:, :, None] - position_ids[:, None, :]) < window
        masks[SLIDING] = allowed & near[:, None]
    if wrapped._module.config.get_text_config()._attn_implementation == "eager":
        # Which adds its mask: booleans would count as 0 and 1.
        dtype = wrapped._module.dtype
        masks = {kind: torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype) for kind, mask in masks.items()}
    return masks if full and window is not None else masks[FULL if full else SLIDING]


def _part(block: Any, place: Place) -> Any:
    name = {"block": "", "mlp": "mlp", "attention": "self_attn"}[place]
    if name and not hasattr(block, name):
        raise InputError(f"the blocks of this model have no part {name!r}: add vectors at `block`.")
    return getattr(block, name) if name else block
