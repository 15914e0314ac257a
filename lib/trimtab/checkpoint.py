"""Tensors on disk: safetensors written atomically, and checkpoints that resume. Nothing here pickles."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, no_grad
from torch.optim import Optimizer

from trimtab.errors import InputError
from trimtab.files import atomic, file_sha256, fingerprint, read_json, remove, write_json
from trimtab.identity import digest, identify, tell

__all__ = [
    "Checkpoint",
    "atomic",
    "file_sha256",
    "fingerprint",
    "load_tensors",
    "metadata_of",
    "read_json",
    "remove",
    "resume_training",
    "save_tensors",
    "training_tensors",
    "write_json",
]

METADATA = "trimtab"
"""Key under which a safetensors file of ours holds its metadata, as JSON."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as one safetensors file, atomically; equal contents give equal bytes. Raises InputError where a
    file is there that Trimtab did not write."""
    with atomic(path, own=_is_own) as partial:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        # One key: safetensors writes several in random order.
        save_file(contiguous, str(partial), {METADATA: json.dumps(dict(metadata or {}), sort_keys=True)})


def load_tensors(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: (tensors by name, metadata). Raises InputError naming a missing or damaged file."""
    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, metadata_of(file)  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"{path} is missing: run the stage that writes it (`dvc repro`).") from None
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}): delete it and run its stage again.") from None


def _is_own(path: Path) -> bool:
    try:
        with safe_open(str(path), framework="pt") as file:
            return METADATA in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def metadata_of(file: Any) -> dict[str, str]:
    """The metadata that `save_tensors` gave an open safetensors file; empty for files of others."""
    return json.loads((file.metadata() or {}).get(METADATA, "{}"))


class Checkpoint:
    """A resumable state: flat tensors and a small JSON-able record, in one safetensors file.

    `identity` and `parts` say what the state belongs to, as `identity.identify` takes them: contents of data and model,
    configuration, code, machine. The state of another identity at the path is told of and put beside it, under a name
    with its digest, where it is found again when that identity returns.
    """

    def __init__(self, path: Path | str | None, *identity: Any, **parts: Any) -> None:
        self.path = None if path is None else Path(path)
        self.identity = identify(*identity, **parts) if path is not None else {}

    def save(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Replace the checkpoint. Does nothing without a path."""
        if self.path is not None:
            self._is_there(self.path)
            metadata = {"identity": json.dumps(self.identity), "record": json.dumps(dict(record))}
            save_tensors(self.path, tensors, metadata)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The saved (tensors, record), or None where there is none of this identity. Raises InputError naming a
        damaged file, and one that is no checkpoint."""
        if self.path is None or not self._is_there(self.path):
            return None
        tensors, metadata = load_tensors(self.path)
        return tensors, json.loads(metadata["record"])

    def drop(self) -> None:
        """Delete the state of this identity, and of no other."""
        if self.path is not None and self._is_there(self.path):
            self.path.unlink()

    def _is_there(self, path: Path) -> bool:
        """Whether the path holds this identity's state, once that of another has made room."""
        there = _identity_at(path)
        if there is not None and digest(there) != digest(self.identity):  # 1, 1.0 and True are equal otherwise
            tell(path, there, self.identity)
            path.replace(_aside(path, there))
        if not path.exists() and _aside(path, self.identity).exists():
            _aside(path, self.identity).replace(path)
        return path.exists()


def _aside(path: Path, identity: Mapping[str, Any]) -> Path:
    return path.with_name(f"{path.stem}-{digest(identity)}{path.suffix}")


def _identity_at(path: Path) -> dict[str, Any] | None:
    """Whose state a file holds; None where there is no file."""
    if not path.exists():
        return None
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file for the checkpoint.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = metadata_of(file)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}): delete it and run its stage again.") from None
    if not {"identity", "record"} <= metadata.keys():
        raise InputError(f"{path} is not a checkpoint of Trimtab's: name another file.")
    try:
        return dict(json.loads(metadata["identity"]))
    except (ValueError, TypeError):  # as it was written before identities had parts
        return {"identity": f"sha256:{metadata['identity']}"}


def training_tensors(model: Mapping[str, Tensor], optimiser: Optimizer) -> dict[str, Tensor]:
    """A model's tensors and its optimiser's state under flat names, as `Checkpoint.save` takes them."""
    tensors = {f"model.{name}": tensor for name, tensor in model.items()}
    for index, slots in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{slot}": tensor for slot, tensor in slots.items()}
    return tensors


@no_grad()
def resume_training(tensors: Mapping[str, Tensor], model: Mapping[str, Tensor], optimiser: Optimizer) -> None:
    """Give the model's tensors, in place, and the optimiser what `training_tensors` took. Raises KeyError for a tensor
    of the model that is not there."""
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, index, slot = name.split(".")
            slots.setdefault(int(index), {})[slot] = tensor
    optimiser.load_state_dict({"state": slots, "param_groups": optimiser.state_dict()["param_groups"]})
    for name, tensor in model.items():
        tensor.copy_(tensors[f"model.{name}"])
