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
    """Write tensors as one safetensors file, atomically; equal contents give equal bytes."""
    with atomic(path) as partial:
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


def metadata_of(file: Any) -> dict[str, str]:
    """The metadata that `save_tensors` gave an open safetensors file; empty for files of others."""
    return json.loads((file.metadata() or {}).get(METADATA, "{}"))


class Checkpoint:
    """A resumable state: flat tensors and a small JSON-able record, in one safetensors file.

    `identity` says what the state belongs to (configuration, data, seed). A checkpoint of another identity is not an
    error: it is of another run, and is ignored and in time overwritten.
    """

    def __init__(self, path: Path | None, identity: Any) -> None:
        self.path = path
        self.identity = fingerprint(identity)

    def save(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Replace the checkpoint. Does nothing without a path."""
        if self.path is not None:
            save_tensors(self.path, tensors, {"identity": self.identity, "record": json.dumps(dict(record))})

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The saved (tensors, record), or None where there is none for this identity."""
        if self.path is None or not self.path.exists():
            return None
        tensors, metadata = load_tensors(self.path)
        if metadata.get("identity") != self.identity:
            return None
        return tensors, json.loads(metadata["record"])


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
