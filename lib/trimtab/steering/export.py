"""Steering vectors as files: safetensors that know their model, and GGUF control vectors for llama.cpp.

The third way out of the library, a stock checkpoint that has them in its biases, is `trimtab.steering.folding`.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import gguf
import torch
from transformers import AutoConfig

from trimtab.checkpoint import atomic, load_tensors, save_tensors
from trimtab.errors import InputError
from trimtab.interventions import Place
from trimtab.pretrained import SOURCE_FILE, model_folder, model_source, weights_sha256
from trimtab.steering.vectors import SteeringVectors

FORMAT, VERSION = "steering vectors", "1"
CONTROL_VECTOR = "controlvector"
"""What llama.cpp calls this kind of GGUF file."""


@dataclass(frozen=True)
class ModelIdentity:
    """Which model some vectors belong to. Two are the same model where all fields are equal."""

    architecture: str
    """`model_type` of its configuration: llama, gemma2, ..."""
    layers: int
    d_model: int
    weights: str
    """Hex SHA-256 of `model.safetensors`, or over the digests of its shards. Another dtype is another model."""


def identify(folder: str | Path) -> ModelIdentity:
    """The identity of a model folder. Raises InputError where it is not one, or holds no safetensors weights."""
    path = model_folder(folder)
    try:
        config: Any = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path}/config.json describes no model that transformers knows: {reason}") from error
    config = config.get_text_config()
    return ModelIdentity(config.model_type, config.num_hidden_layers, config.hidden_size, _weights_digest(path))


def save_vectors(path: str | Path, vectors: SteeringVectors, model_folder: str | Path) -> None:
    """Write the vectors, or their low-rank factors, as one safetensors file with all that `load_vectors` needs.

    `model_folder`: the model they were trained in; its identity goes with them. Raises InputError where they do not
    fit it.
    """
    identity = identify(model_folder)
    check_fits(vectors, identity)
    record = {
        "layers": vectors.layers, "place": vectors.place, "rank": vectors.rank, "scale": vectors.scale,
        "model": asdict(identity),
    }  # fmt: skip
    tensors = {name: tensor.cpu() for name, tensor in vectors.state_dict().items()}
    metadata = {"format": FORMAT, "version": VERSION, "record": json.dumps(record, sort_keys=True)}
    save_tensors(Path(path), tensors, metadata)


def load_vectors(path: str | Path, model_folder: str | Path | None = None, device: str = "cpu") -> SteeringVectors:
    """Read what `save_vectors` wrote; the vectors can be trained further.

    With `model_folder` they must belong to that model: InputError tells the first field of its identity that differs.
    Raises InputError also for a file that is missing, damaged, of another kind or version, or of wrong shapes.
    """
    path = Path(path)
    tensors, metadata = load_tensors(path, device)
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} holds no steering vectors: it is not a file that save_vectors wrote.")
    if metadata.get("version") != VERSION:
        raise InputError(f"{path} is of format version {metadata.get('version')}; version {VERSION} is read here.")
    try:
        record = json.loads(metadata["record"])
        expected = ModelIdentity(**record["model"])
        if record["place"] not in get_args(Place):
            raise ValueError(f"place {record['place']!r}")
        # A generator of its own: reading a file must not move the global random state.
        vectors = SteeringVectors(
            record["layers"],
            expected.d_model,
            place=record["place"],
            rank=record["rank"],
            generator=torch.Generator(),
        )
        vectors.scale = float(record["scale"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged, its record cannot be read ({error}): save the vectors again.") from error
    if model_folder is not None:
        _refuse_another(path, expected, model_folder)
    needed = {name: list(tensor.shape) for name, tensor in vectors.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if found != needed:
        raise InputError(f"{path} holds tensors of shapes {found}, but its record asks for {needed}.")
    vectors.load_state_dict(tensors)
    check_fits(vectors, expected)
    return vectors.to(device)


def export_gguf(
    vectors: SteeringVectors, model_folder: str | Path, path: str | Path, *, leave_out_first: bool = False
) -> None:
    """Write a GGUF control vector: `llama-cli --control-vector FILE`, or `--control-vector-scaled FILE SCALE`.

    llama.cpp adds `direction.N` (fp32, [d_model]) to the residual stream after its block N, counted from 0, at every
    position: N is our layer index, and vectors of place `block` are what it means. The vectors' scale is included.

    There is no direction.0: llama.cpp's loader rejects a file that has one, and its buffer begins at block 1. So
    vectors that move block 0 are refused, unless `leave_out_first` says to drop that one (what is then exported is
    another intervention than the one trained). For all layers, `fold` the vectors and convert the folded checkpoint:
    llama.cpp reads the biases of Llama MLPs.

    Every block from 1 on gets a direction, zeros where there is no vector: llama.cpp would otherwise keep, for the
    blocks beyond the last one named, what an earlier control vector left there. Raises InputError for another place,
    where the vectors do not fit the model, and where the file exists and is no control vector.
    """
    identity = identify(model_folder)
    check_fits(vectors, identity)
    if vectors.place != "block":
        raise InputError(
            f"A GGUF control vector is added after a whole block, so vectors of place {vectors.place!r} cannot be "
            "exported as one: fold them into a checkpoint."
        )
    rows = torch.zeros(identity.layers, identity.d_model)
    rows[list(vectors.layers)] = vectors.vectors().detach().float().cpu()
    if rows[0].any() and not leave_out_first:
        raise InputError(
            "llama.cpp cannot add a vector after block 0, and these vectors have one there: fold them into a "
            "checkpoint and convert that, train without layer 0, or leave it out with leave_out_first=True."
        )
    if not rows[1:].any():
        raise InputError("Nothing is left to export: no vector at a layer above 0 differs from zero.")
    with atomic(Path(path), own=_is_control_vector) as partial:
        writer = gguf.GGUFWriter(partial, CONTROL_VECTOR)
        writer.add_string(f"{CONTROL_VECTOR}.model_hint", identity.architecture)
        writer.add_int32(f"{CONTROL_VECTOR}.layer_count", identity.layers - 1)  # the number of directions
        for layer in range(1, identity.layers):
            writer.add_tensor(f"direction.{layer}", rows[layer].numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def check_fits(vectors: SteeringVectors, identity: ModelIdentity) -> None:
    """Raise InputError unless the vectors are finite, of the model's width, and at layers that it has."""
    added = vectors.vectors()
    if added.shape[1] != identity.d_model:
        raise InputError(f"The vectors have {added.shape[1]} entries, but the model's width is {identity.d_model}.")
    if not 0 <= vectors.layers[0] <= vectors.layers[-1] < identity.layers:
        raise InputError(
            f"The vectors are at layers {list(vectors.layers)}, but the model has 0 to {identity.layers - 1}."
        )
    if not bool(added.isfinite().all()):
        raise InputError("The vectors hold values that are not finite: their training has diverged.")


def _is_control_vector(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(4096)
    return start.startswith(b"GGUF") and CONTROL_VECTOR.encode() in start


def _refuse_another(path: Path, expected: ModelIdentity, folder: str | Path) -> None:
    found = asdict(identify(folder))
    for name, value in asdict(expected).items():
        if found[name] != value:
            raise InputError(
                f"{path} holds vectors of another model than {folder}: {name} expected {value}, found {found[name]}."
            )


def _weights_digest(folder: Path) -> str:
    if (folder / "model.safetensors").is_file() and (folder / SOURCE_FILE).is_file():
        return model_source(folder).sha256  # recorded when the folder was fetched, which spares reading gigabytes
    return weights_sha256(folder)  # an early record of sharded weights is of their index, which fine-tunes share
