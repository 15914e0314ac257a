"""Steering vectors inside a stock checkpoint: the biases of its blocks, which any engine then applies unawares.

In a pre-norm block the last thing that happens before a residual addition is a linear layer, so a vector added to the
stream there is that layer's bias:

| place | bias of | switched on by |
|---|---|---|
| block, mlp | `mlp.down_proj` | `mlp_bias` |
| attention | `self_attn.o_proj` | `attention_bias` |

The other linear layers that the switch gives a bias get zeros. This is exact only where a stock load reads those biases
and nothing comes between them and the stream, so whatever is written is loaded again and compared before it is kept.
"""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.checkpoint import atomic, write_json
from trimtab.errors import InputError
from trimtab.files import check_path
from trimtab.interventions import Head, Place, final_hidden, steer, wrap
from trimtab.pretrained import DTYPES, SOURCE_FILE, load_model, load_tokenizer, model_source, weights_sha256
from trimtab.steering.export import check_fits, identify
from trimtab.steering.vectors import SteeringVectors

if TYPE_CHECKING:
    from nnsight import TransformersModel

PARTS: dict[Place, tuple[str, str, str]] = {
    "block": ("mlp", "down_proj", "mlp_bias"),
    "mlp": ("mlp", "down_proj", "mlp_bias"),
    "attention": ("self_attn", "o_proj", "attention_bias"),
}
"""For each place: the part of a block, its last linear layer, and the key of the configuration for its biases."""
FOLDABLE = ("llama", "smollm3", "granite")
POST_NORM = ("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4")  # nor have their MLPs biases
NO_MLP_BIAS = ("qwen2", "qwen3", "mistral", "phi3", "gemma", "olmo")
COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja",
    "generation_config.json",
)  # fmt: skip
TOLERANCE = 1e-3
"""Largest difference of logits in fp32, relative to the largest logit. Rounding gave up to 5e-5 in thirty layers; a
bias that is dropped or normalised gives what its vector moves, of the order of 0.1."""


def fold(
    vectors: SteeringVectors,
    model_folder: str | Path,
    out_folder: str | Path,
    *,
    dtype: str = "auto",
    tolerance: float = TOLERANCE,
) -> float:
    """Write the model with the vectors (times their scale) as biases, its tokenizer and its generation config.

    Plain `AutoModelForCausalLM.from_pretrained(out_folder)` then gives the steered model. Biases that the model has
    already are kept, and added to. Other files of the folder stay; one of the same name that Trimtab did not write is
    refused.

    `dtype`: float32 | bfloat16 | float16 | auto (as stored). All of the checkpoint has it, the biases included: in
    bfloat16 an entry keeps 8 significant bits (relative error up to 2^-8; 2^-11 in float16), and a forward pass in it
    adds a bias before rounding what the layer writes, where the view adds a vector after rounding the stream, so that
    logits agree only up to the rounding of that dtype. `float32` keeps the vectors exact, at up to twice the size.

    Returns the largest difference of logits, relative to the largest logit, between the folded checkpoint and the
    steered original on a few random tokens, both computed in fp32 from what is stored. Raises InputError where it
    exceeds `tolerance`, for an architecture where folding is not exact, and where the vectors do not fit the model.
    """
    source, target = Path(model_folder), Path(out_folder)
    check_path(target)
    identity = identify(source)
    check_fits(vectors, identity)
    _refuse_architecture(identity.architecture, vectors.place)
    if dtype not in ("auto", *DTYPES):
        raise InputError(f"dtype must be one of auto, {', '.join(DTYPES)}, not {dtype!r}.")
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise InputError(f"Writing {target} would replace the model in {source}: give another folder.")
    with atomic(target, "model") as partial:
        model = load_model(source, dtype)
        added = add_biases(model, vectors)
        model.save_pretrained(partial)
        del model
        for pattern in COPIED:
            for file in filter(Path.is_file, source.glob(pattern)):
                shutil.copyfile(file, partial / file.name)
        difference = _difference(source, dtype, vectors, added, partial)
        if not difference <= tolerance:  # nor may it be NaN
            raise InputError(
                f"Folding these vectors into {source} is not exact: logits differ by {difference:.2g} of the largest "
                f"from those of the steered model, where {tolerance:g} is allowed; add them with a hook instead."
            )
        _record(source, partial, vectors)
    return difference


@torch.no_grad()
def add_biases(model: PreTrainedModel, vectors: SteeringVectors) -> Float[Tensor, "layers d_model"]:
    """Put the vectors into the biases of a loaded model, in place. Returns what they add to the stream as stored, that
    is after rounding to the model's dtype, in fp32."""
    part, last, switch = PARTS[vectors.place]
    # Granite multiplies what a part writes by this before adding it to the stream; a vector of place `mlp` or
    # `attention` is multiplied with it, one of place `block` is not.
    factor = getattr(model.config, "residual_multiplier", 1.0) if vectors.place == "block" else 1.0
    parts = [getattr(block, part) for block in model.model.layers]
    for linear in (module for whole in parts for module in whole.modules() if isinstance(module, nn.Linear)):
        if linear.bias is None:
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
    setattr(model.config, switch, True)
    added = []
    for layer, vector in zip(vectors.layers, vectors.vectors().cpu(), strict=True):
        bias = getattr(parts[layer], last).bias
        before = bias.float().clone()
        bias.copy_(before + vector / factor)
        added.append((bias.float() - before) * factor)
    return torch.stack(added)


def _refuse_architecture(architecture: str, place: Place) -> None:
    if architecture in FOLDABLE:
        return
    reason = f"folding is known to be exact for {', '.join(FOLDABLE)} only"
    if place == "block" and architecture in POST_NORM:
        reason = "it normalises what its MLP writes before adding it to the stream (post-norm)"
    elif place != "attention" and architecture in (*POST_NORM, *NO_MLP_BIAS):
        reason = "its MLP has bias=False in the code of transformers, so that a stock load would drop the vectors"
    others = "a hook or a GGUF control vector" if place == "block" else "a hook"
    raise InputError(
        f"Vectors of place {place!r} cannot be folded exactly into a model of type {architecture!r}: {reason}; add "
        f"them with {others} instead."
    )


def _difference(
    source: Path, dtype: str, vectors: SteeringVectors, added: Float[Tensor, "layers d_model"], folded: Path
) -> float:
    """Largest difference of logits, relative to the largest, on random tokens that are always the same: the original
    under the view that vectors are trained in, against the folded checkpoint as stock code loads it."""
    original = load_model(source, dtype).float()  # the weights as stored, exactly
    view = steer(wrap(original, load_tokenizer(source)), vectors.layers, lambda: added, vectors.place)
    steered = _logits(view)
    stock = load_model(folded)
    difference = (_logits(wrap(stock, load_tokenizer(folded))) - steered).abs().max()
    return float(difference / steered.abs().max())


@torch.no_grad()
def _logits(view: "TransformersModel") -> Float[Tensor, "batch seq vocabulary"]:
    """The model's own logits of the view's final hidden states."""
    ids = torch.randint(view._module.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    hidden = final_hidden(view, ids, torch.ones_like(ids), torch.arange(ids.shape[1]).expand_as(ids))
    return Head(view)(hidden)


def _record(source: Path, folded: Path, vectors: SteeringVectors) -> None:
    """Carry `source.json` on, where there is one: its licence and its citation hold for the folded model too."""
    if not (source / SOURCE_FILE).is_file():
        return
    known = model_source(source)
    layers = ", ".join(map(str, vectors.layers))
    note = f"steering vectors folded into its biases (place {vectors.place}, layers {layers})"
    note = f"{known.note}; {note}" if known.note else note
    write_json(folded / SOURCE_FILE, asdict(replace(known, sha256=weights_sha256(folded), note=note)))
