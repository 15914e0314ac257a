"""Other libraries' side of the exchange, run by their own environment (`make peers`), where trimtab cannot be imported.

    .venv-peers/bin/python tests/sae/peers.py FOLDER

`FOLDER/inputs.safetensors` holds inputs by width. Loads every SAE of `FOLDER/exports` with SAELens, saves SAEs of each
library's own under `FOLDER/imports`, and writes what each makes of the inputs to `FOLDER/outputs.safetensors`.
"""

import json
import sys
from pathlib import Path

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from sae_lens import SAE, BatchTopKTrainingSAE, JumpReLUSAE, TopKSAE, TopKTrainingSAE
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig
from torch import nn

SHAPE = {"d_in": 16, "d_sae": 64}
REAL_SHAPE = {"d_in": 576, "d_sae": 4096}
K = 5


def randomised(sae: nn.Module) -> nn.Module:
    """Every weight moved from its initial value: biases are not zero, and decoder norms neither 1 nor equal."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sae.named_parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.3 * weight.shape[-1] ** -0.5)
            if "dec" in name and weight.ndim == 2:  # stored [latents, d_model], or transposed where a Linear holds it
                scale = 0.5 + torch.rand(max(weight.shape), generator=generator)
                weight.mul_(scale[:, None] if len(weight) == len(scale) else scale)
            if name.startswith("threshold"):
                weight.copy_(torch.rand(weight.shape, generator=generator))
    return sae.eval()


def saelens(folder: Path) -> dict[str, nn.Module]:
    """By folder name: an SAE that gives what the one saved there should give."""
    kinds = {
        "topk": (TopKSAE, SHAPE | {"k": K, "apply_b_dec_to_input": True}),
        "topk-by-norm": (TopKSAE, SHAPE | {"k": K, "rescale_acts_by_decoder_norm": True}),
        "topk-real-shape": (TopKSAE, REAL_SHAPE | {"k": 64, "rescale_acts_by_decoder_norm": True}),
        "topk-uncentred": (TopKSAE, SHAPE | {"k": K, "apply_b_dec_to_input": False}),
        "jumprelu": (JumpReLUSAE, SHAPE),
        "topk-in-training": (TopKTrainingSAE, SHAPE | {"k": K, "decoder_init_norm": 0.5}),
        "batchtopk-in-training": (BatchTopKTrainingSAE, SHAPE | {"k": K, "decoder_init_norm": 0.5}),
    }
    made: dict[str, nn.Module] = {}
    for name, (kind, options) in kinds.items():
        architecture = name.split("-")[0]
        sae = randomised(kind.from_dict({"architecture": architecture, **options}))
        if architecture == "batchtopk":
            sae.topk_threshold.fill_(0.4)
            sae.save_inference_model(folder / "saelens-batchtopk")
            made["saelens-batchtopk"] = made[f"saelens-{name}"] = SAE.load_from_disk(folder / "saelens-batchtopk")
        else:
            made[f"saelens-{name}"] = sae
        sae.save_model(folder / f"saelens-{name}")
    return made


def dictionary_learning(folder: Path) -> dict[str, nn.Module]:
    """As its training loop saves them: a state dict beside the trainer's configuration."""
    made = {}
    for name, kind in {"topk": AutoEncoderTopK, "batchtopk": BatchTopKSAE}.items():
        sae = randomised(kind(SHAPE["d_in"], SHAPE["d_sae"], K))
        sae.threshold.fill_(0.3)
        made[f"dictionary_learning-{name}"] = sae
        place = folder / f"dictionary_learning-{name}"
        place.mkdir()
        torch.save(sae.state_dict(), place / "ae.pt")
        (place / "config.json").write_text(
            json.dumps({"trainer": {"dict_class": kind.__name__, "k": K}, "buffer": {}}), encoding="utf-8"
        )
    return made


class Reconstruction(nn.Module):
    """A sparsify coder that returns nothing but its reconstruction."""

    def __init__(self, coder: SparseCoder) -> None:
        super().__init__()
        self.coder = coder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.coder(x).sae_out


def sparsify(folder: Path) -> dict[str, nn.Module]:
    coder = randomised(SparseCoder(SHAPE["d_in"], SparseCoderConfig(num_latents=SHAPE["d_sae"], k=K)))
    coder.save_to_disk(folder / "sparsify-topk")
    return {"sparsify-topk": Reconstruction(coder)}


@torch.inference_mode()
def main(folder: Path) -> None:
    torch.set_num_threads(1)
    inputs = load_file(folder / "inputs.safetensors")
    (folder / "imports").mkdir()
    saes = {path.name: SAE.load_from_disk(path) for path in sorted((folder / "exports").iterdir())}
    for library in (saelens, dictionary_learning, sparsify):
        saes |= library(folder / "imports")
    outputs = {}
    for name, sae in saes.items():
        real = name.endswith("real-shape")
        outputs[name] = sae(inputs[str((REAL_SHAPE if real else SHAPE)["d_in"])]).contiguous()
    save_file(outputs, folder / "outputs.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
