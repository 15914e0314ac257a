"""The only door to nnsight: wrap a loaded model, read its residual stream, and put another in its place.

A *site* is the index of a decoder block, counted from 0; its activation is the residual stream after that block:
`hidden_states[site + 1]` of transformers, except for the last block, where transformers gives the state after the final
norm instead. Traces live here, in importable functions, because nnsight re-reads the
source of the code that opens a trace.
"""

import copy
import functools
from collections.abc import Callable, Sequence
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
# What the norm between the last block and the unembedding is called, beside the blocks.
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm")


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
    _check(sites, blocks)
    chosen = [blocks[site] for site in sites]
    deepest = blocks[max(sites)]
    with torch.inference_mode(), wrapped.trace(_inputs(input_ids, attention_mask)) as tracer:
        cache = tracer.cache(modules=chosen, device=None).save()
        deepest.output  # noqa: B018 (wait for this block, then leave the forward)
        tracer.stop()
    return {site: _hidden(cache[block.path].output) for site, block in zip(sites, chosen, strict=True)}


def resume(
    wrapped: TransformersModel,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Int[Tensor, "batch seq"],
    site: int,
    residual: Float[Tensor, "batch seq d_model"],
) -> Float[Tensor, "batch seq vocabulary"]:
    """Logits from a given residual stream at `site`: the blocks up to it are skipped, those above it run.

    With what `capture` gives for the site, these are the logits of the full pass; every replacement of the same batch
    then costs only the blocks above. In the model's own dtype. Raises InputError for a site that the model does not
    have.
    """
    blocks = _blocks(wrapped)
    _check([site], blocks)
    inputs = _inputs(input_ids, attention_mask)
    output = _like_a_block(wrapped, input_ids, residual)
    # Skipped blocks would leave holes in a key-value cache.
    with torch.inference_mode(), wrapped.trace(inputs, use_cache=False):
        for block in blocks[: site + 1]:
            block.skip(output)
        logits = wrapped.output.logits.save()
    return logits


def splice(
    wrapped: TransformersModel,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Int[Tensor, "batch seq"],
    site: int,
    replace: Callable[[Float[Tensor, "batch seq d_model"]], Float[Tensor, "batch seq d_model"]],
) -> Float[Tensor, "batch seq vocabulary"]:
    """Logits where the residual stream at `site` is replaced by `replace` of it, in one pass. For many replacements of
    one batch call `capture` once, and `resume` for each."""
    residual = capture(wrapped, input_ids, attention_mask, [site])[site]
    return resume(wrapped, input_ids, attention_mask, site, replace(residual))


@torch.no_grad()
def direct_logits(wrapped: TransformersModel, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocabulary"]:
    """What a direction in the residual stream adds to the logits on the direct path: through the final norm's weight
    and the unembedding, past every block above. fp32, centred over the vocabulary.

    An approximation: it leaves out the blocks between, and the final norm's division by the length of the whole
    residual, which is the same for all tokens. So only the order and the ratios of the effects mean something.
    """
    norm = _final_norm(wrapped)
    weights = {name: weight.float() for name, weight in norm.named_parameters()}
    directions = directions.float().to(device_of(wrapped))
    # At a root mean square of 1 the norm multiplies by its gain alone, however its family writes the gain down.
    length = directions.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-12)
    unit, zero = (torch.func.functional_call(norm, weights, x) for x in (directions / length, 0 * directions))
    unembedding = wrapped._module.get_output_embeddings().weight
    logits = (unit - zero) * length @ unembedding.float().T
    return logits - logits.mean(dim=1, keepdim=True)


def device_of(wrapped: TransformersModel) -> torch.device:
    """Where the model's weights are, and its inputs must be."""
    return next(wrapped._module.parameters()).device


def _inputs(
    input_ids: Int[Tensor, "batch seq"], attention_mask: Int[Tensor, "batch seq"]
) -> dict[str, Int[Tensor, "batch seq"]]:
    if bool(attention_mask.all()):  # without padding, attention may take its faster causal path
        return {"input_ids": input_ids}
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _check(sites: Sequence[int], blocks: Any) -> None:
    wrong = [site for site in sites if not 0 <= site < len(blocks)]
    if wrong or not sites:
        raise InputError(f"site {wrong[0] if wrong else sites} is not a block of this model: 0 to {len(blocks) - 1}.")


def _final_norm(wrapped: TransformersModel) -> torch.nn.Module:
    for path in BLOCK_PATHS:
        try:
            parent = functools.reduce(getattr, path.split(".")[:-1], wrapped._module)
        except AttributeError:
            continue
        for name in FINAL_NORMS:
            if isinstance(norm := getattr(parent, name, None), torch.nn.Module):
                return norm
    raise InputError(
        f"{type(wrapped._module).__name__} keeps its final norm in an unknown place; "
        f"known are {', '.join(FINAL_NORMS)}, beside the blocks."
    )


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


def _like_a_block(wrapped: TransformersModel, input_ids: Tensor, hidden: Tensor) -> Tensor | tuple[Any, ...]:
    """`hidden` in the form in which the model's blocks return theirs, seen on one token."""
    first = _blocks(wrapped)[0]
    with torch.inference_mode(), wrapped.trace({"input_ids": input_ids[:1, :1]}, use_cache=False) as tracer:
        output = first.output.save()
        tracer.stop()
    return hidden if isinstance(output, Tensor) else (hidden, *[None] * (len(output) - 1))


def _hidden(output: Tensor | tuple[Any, ...]) -> Tensor:
    # transformers 5 returns a tensor from a Llama block; other families still return a tuple.
    return output if isinstance(output, Tensor) else output[0]
