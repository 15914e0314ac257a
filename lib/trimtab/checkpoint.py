"""Files that are either whole or absent: atomic writes, digests, and checkpoints that resume.

A write goes to a neighbour named `.<name>.partial-<pid>`, is flushed to disk, and takes its place by one rename. A
process killed at any moment leaves the old file or the new one; of a folder, which cannot be replaced in one step,
perhaps neither. Nothing here pickles.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, no_grad
from torch.optim import Optimizer

from trimtab.errors import InputError

METADATA = "trimtab"
"""Key under which a safetensors file of ours holds its metadata, as JSON."""


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Hex SHA-256 of a JSON-serialisable value; equal values give equal digests, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a path to write to; on success it becomes `path` (a file or a folder), on failure nothing is left.

    Partial writes of processes that are no more are removed on the way.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.partial-*"):
        if not psutil.pid_exists(int(stale.name.rpartition("-")[2])):
            remove(stale)
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        yield partial
        _flush(partial)
        if path.is_dir():  # a rename cannot replace a folder that holds files
            shutil.rmtree(path)
        partial.replace(path)
    finally:
        remove(partial)


def remove(path: Path) -> None:
    """Delete a file or a folder; a missing one is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON. Raises InputError naming the file when it is missing or is not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} is missing: run the stage that writes it (`dvc repro`).") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable JSON ({error}): delete it and run its stage again.") from None


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


def _flush(path: Path) -> None:
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
