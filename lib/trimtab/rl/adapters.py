"""What policies are made of: a frozen model, and LoRA's factors in it."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from trimtab.errors import InputError
from trimtab.interventions import wrap
from trimtab.pretrained import load_model, load_tokenizer

if TYPE_CHECKING:
    from nnsight import TransformersModel


def frozen_model(folder: str, *, dtype: str, device: str) -> "TransformersModel":
    """The model in a folder under nnsight, none of its weights trained."""
    model = load_model(folder, dtype=dtype, device=device)
    model.requires_grad_(False)
    return wrap(model, load_tokenizer(folder))


DOWN = ("mlp.down_proj", "mlp.c_proj", "mlp.fc2", "fc2", "mlp.dense_4h_to_h")
"""What families call the last linear layer of a block's MLP: Llama and its kin, GPT-2, Phi, OPT, NeoX and Falcon."""


def down_projections(wrapped: "TransformersModel") -> list[str]:
    """Full names of the last linear layer of every block's MLP. Raises InputError for a model that keeps it
    elsewhere."""
    names = [name for name, _ in wrapped._module.named_modules()]
    for known in DOWN:
        if found := [name for name in names if re.search(rf"\.\d+\.{re.escape(known)}$", name)]:
            return found
    raise InputError(
        f"{type(wrapped._module).__name__} keeps its down projections in an unknown place; known are {', '.join(DOWN)}."
    )


def inject_lora(wrapped: "TransformersModel", modules: str | Sequence[str], rank: int, seed: int) -> dict[str, Tensor]:
    """LoRA (Hu et al. 2021) on the modules of those names, or on "all-linear" ones, alpha = rank, in fp32 whatever the
    model's precision; the adapters' tensors by name. `seed`: of the random factors; the others begin at 0."""
    targets = modules if isinstance(modules, str) else list(modules)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, lora_dropout=0.0, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, wrapped._module)
    trained = {name: p for name, p in wrapped._module.named_parameters() if "lora_" in name}
    for parameter in trained.values():
        parameter.data = parameter.data.float()
    return trained
