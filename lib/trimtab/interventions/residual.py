"""Read the residual stream, and put another in its place.

Traces live here, in importable functions, because nnsight re-reads the source of the code that opens a trace.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from nnsight import TransformersModel
from torch import Tensor

from trimtab.interventions.model import blocks_of, check_sites, device_of, final_norm, hidden_of
from trimtab.interventions.readout import Head
from trimtab.interventions.steering import add_at, additions_of


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
    model, additions = additions_of(wrapped)
    blocks = blocks_of(model)
    check_sites(sites, len(blocks))
    visited = sorted({layer for each in additions for layer in each.layers if layer <= max(sites)} | set(sites))
    found: dict[int, Any] = {}
    with torch.inference_mode(), model.trace(_inputs(input_ids, attention_mask)) as tracer:
        added = [each.vectors() for each in additions]
        owed: list[Tensor | None] = [None] * len(additions)
        for layer in visited:
            add_at(blocks, layer, additions, added, owed)
            if layer in sites:
                hidden: Any = hidden_of(blocks[layer].output)
                found[layer] = hidden.save()
        tracer.stop()
    return {site: found[site].detach() for site in sites}


def resume(
    wrapped: TransformersModel,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Int[Tensor, "batch seq"],
    site: int,
    residual: Float[Tensor, "batch seq d_model"],
) -> Float[Tensor, "batch seq vocabulary"]:
    """Logits from a given residual stream at `site`: the blocks up to it are skipped, those above it run.

    With what `capture` gives for the site, these are the logits of the full pass (of a steered 16-bit model but for
    what rounding still owes the vectors below); every replacement of the same batch then costs only the blocks above.
    In the model's own dtype. Raises InputError for a site that the model does not have.
    """
    model, additions = additions_of(wrapped)
    blocks = blocks_of(model)
    check_sites([site], len(blocks))
    inputs = _inputs(input_ids, attention_mask)
    output = _like_a_block(model, input_ids, residual)
    above = sorted({layer for each in additions for layer in each.layers if layer > site})
    # Skipped blocks would leave holes in a key-value cache.
    with torch.inference_mode(), model.trace(inputs, use_cache=False):
        for block in blocks[: site + 1]:
            block.skip(output)
        added = [each.vectors() for each in additions]
        owed: list[Tensor | None] = [None] * len(additions)
        for layer in above:
            add_at(blocks, layer, additions, added, owed)
        logits = model.output.logits.save()
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
    norm = final_norm(wrapped)._module
    weights = {name: weight.float() for name, weight in norm.named_parameters()}
    directions = directions.float().to(device_of(wrapped))
    # At a root mean square of 1 the norm multiplies by its gain alone, however its family writes the gain down.
    length = directions.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-12)
    unit, zero = (torch.func.functional_call(norm, weights, x) for x in (directions / length, 0 * directions))
    head = Head(wrapped)
    logits = (unit - zero) * length @ head.unembedding.weight.float().T * head.scale
    return logits - logits.mean(dim=1, keepdim=True)


def _inputs(
    input_ids: Int[Tensor, "batch seq"], attention_mask: Int[Tensor, "batch seq"]
) -> dict[str, Int[Tensor, "batch seq"]]:
    if bool(attention_mask.all()):  # without padding, attention may take its faster causal path
        return {"input_ids": input_ids}
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _like_a_block(wrapped: TransformersModel, input_ids: Tensor, hidden: Tensor) -> Tensor | tuple[Any, ...]:
    """`hidden` in the form in which the model's blocks return theirs, seen on one token."""
    first = blocks_of(wrapped)[0]
    with torch.inference_mode(), wrapped.trace({"input_ids": input_ids[:1, :1]}, use_cache=False) as tracer:
        output = first.output.save()
        tracer.stop()
    return hidden if isinstance(output, Tensor) else (hidden, *[None] * (len(output) - 1))
