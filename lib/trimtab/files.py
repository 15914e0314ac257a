"""Files that are either whole or absent: atomic writes, digests, JSON.

A write goes to a neighbour named `.<name>.partial-<pid>`, is flushed to disk, and takes its place by one rename. A
process killed at any moment leaves the old file or the new one; of a folder, which cannot be replaced in one step,
perhaps neither. Imports nothing heavy: the runner, which opens every stage, has no other use for torch.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from trimtab.errors import InputError

FULL = {errno.ENOSPC, errno.EDQUOT}
CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}


def disk_trouble(error: Exception, path: Path | str | None = None) -> str | None:
    """One sentence on an error that the disk is the cause of: it is full, or may not be written to; None for others.
    `path`: what was to be written, where the error does not say."""
    number = getattr(error, "errno", None)
    where = getattr(error, "filename", None) or path
    if number in FULL or "(os error 28)" in str(error):  # as safetensors and polars, which are not Python, put it
        return f"{path or where} was not written, the disk is full: free some space; what was finished is kept."
    if number in CLOSED and where:
        return f"{where} cannot be written, it is read-only or not yours: change its permissions, or work in a copy."
    return None


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

    Partial writes of processes that are no more are removed on the way. Raises InputError where the disk is full or may
    not be written to.
    """
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".{path.name}.partial-*"):
            if not psutil.pid_exists(int(stale.name.rpartition("-")[2])):
                remove(stale)
        yield partial
        _flush(partial)
        if path.is_dir():  # a rename cannot replace a folder that holds files
            shutil.rmtree(path)
        partial.replace(path)
    except Exception as error:
        if trouble := disk_trouble(error, path):
            raise InputError(trouble) from error
        raise
    finally:
        remove(partial)


def remove(path: Path) -> None:
    """Delete a file or a folder; a missing one is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.is_symlink() or path.exists():  # asked to delete what is not there, a read-only disk complains
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


def _flush(path: Path) -> None:
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
