"""Files that are either whole or absent, written so that nothing is lost that Trimtab did not make.

A write goes to a neighbour named `.<name>.partial-<host>-<pid>-<token>`, is flushed to disk, and takes its place by a
rename. A process killed at any moment leaves the old file or the new one. A folder that exists is filled file by file:
its hidden mark `.trimtab` lists Trimtab's own files with their digests, and only what is still as listed is ever
replaced or removed.
Imports nothing heavy: the runner, which opens every stage, has no other use for torch.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from filelock import FileLock, Timeout

from trimtab.errors import InputError
from trimtab.marks import contents, fill, sha256
from trimtab.marks import file_sha256 as file_sha256

if TYPE_CHECKING:
    import polars as pl

FULL = {errno.ENOSPC, errno.EDQUOT}
CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}
UNFIT = re.compile("[\0\ud800-\udfff]")
"""What no file name holds: NUL, and halves of surrogate pairs."""


def disk_trouble(error: Exception, path: Path | str | None = None) -> str | None:
    """One sentence on an error whose cause is the disk: it is full, or may not be written to; None for other errors.
    `path`: what was to be written, where the error does not say."""
    number = getattr(error, "errno", None)
    where = getattr(error, "filename", None) or path
    if number in FULL or "(os error 28)" in str(error):  # as safetensors and polars, which are not Python, put it
        return f"{path or where} was not written, the disk is full: free some space; what was finished is kept."
    if number in CLOSED and where:
        return f"{where} cannot be written, it is read-only or not yours: change its permissions, or work in a copy."
    return None


def tree_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, or of a folder's relative names and contents; the mark of a folder does not
    count. Raises InputError where nothing is there, and for a link to a folder within: who changes what lies behind
    it changes nothing here."""
    if path.is_file():
        return file_sha256(path)
    if not path.is_dir():
        raise InputError(f"{path} is missing: run the stage that writes it (`dvc repro`).")
    sums = {name: sha256(path / name) for name in contents(path)}
    if linked := [name for name, sum_ in sums.items() if sum_ is None and (path / name).is_dir()]:
        raise InputError(f"{path / linked[0]} is a link to a folder: put the folder itself there.")
    return fingerprint([[name, sum_] for name, sum_ in sums.items()])


def fingerprint(value: Any) -> str:
    """Hex SHA-256 of a JSON-serialisable value; equal values give equal digests, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def atomic(path: Path, kind: str = "files", *, own: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield a path to write to, a file or a folder; on success it becomes `path`, on failure nothing is left.

    A folder that exists keeps what is not Trimtab's: files that an earlier write of the same `kind` made are replaced,
    or removed where they are no longer written. `own` tells whether a file that exists may be replaced (default: any),
    and of a folder, which other files than those that are as its mark lists them (default: none).
    Partial writes of processes of this host that are no more are removed on the way. Raises InputError, before
    anything is touched, for a path that no file can have; where a foreign or changed file, a folder, a link to one or a
    device is in the place of a file, or a file or a link in that of a folder; and where the disk is full or may not be
    written to.
    """
    check_path(path)
    target = path.resolve() if path.is_dir() else path.absolute()  # a link to a file is replaced itself
    stem = f".{_short(target.name)}.partial-{_host()}-"
    partial = target.parent / f"{stem}{os.getpid()}-{secrets.token_hex(4)}"
    if os.path.lexists(target) and not (target.is_file() or target.is_dir() or target.is_symlink()):
        raise InputError(f"{path} is neither a file nor a folder: name another path.")
    if target.is_file() and own is not None and not own(target):
        raise InputError(f"{path} exists and was not written by Trimtab: name a new file, or remove it first.")
    try:
        _make_parent(target, path)
        for stale in target.parent.glob(f"{_glob(stem)}*"):
            number = stale.name.removeprefix(stem).partition("-")[0]
            if number.isdigit() and not psutil.pid_exists(int(number)):
                remove(stale)
        yield partial
        _flush(partial)
        if partial.is_dir():
            fill(partial, target, path, kind, own)
        elif target.is_dir():
            raise InputError(f"{path} is a folder: name a file.")
        else:
            partial.replace(target)
    except Exception as error:
        if trouble := disk_trouble(error, path):
            raise InputError(trouble) from error
        raise
    finally:
        remove(partial)


def check_path(path: Path) -> None:
    """Raise InputError for a path that no file can have."""
    if UNFIT.search(str(path)):
        raise InputError(f"{str(path)!a} is no path: it holds a NUL or half a character.")
    if len(str(path).encode()) > 3500 or any(len(part.encode()) > 255 for part in path.parts):
        raise InputError(f"{str(path)[:60]}... is too long: 255 bytes are the most that a name may have, 3500 a path.")


def publish(source: Path, target: Path) -> None:
    """Copy the folder `source` to `target` as `atomic` does, by hard links where both lie on one file system."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:  # another file system, or one without links
            shutil.copy2(one, other)

    with atomic(target) as partial:
        shutil.copytree(source, partial, copy_function=link)


@contextmanager
def exclusive(paths: list[Path], folder: Path) -> Iterator[None]:
    """Hold `paths` alone among the processes that ask so, by lock files in `folder`, which the system frees when this
    process ends, however it ends. Raises InputError where another process holds one of them."""
    folder.mkdir(parents=True, exist_ok=True)
    held: list[FileLock] = []
    try:
        for path in sorted(set(paths)):
            lock = FileLock(folder / f"{fingerprint(str(path))[:16]}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise InputError(f"{path} is being written by another run: wait for it, or stop it.") from None
            held.append(lock)
        yield
    finally:
        for lock in held:
            lock.release()


def remove(path: Path) -> None:
    """Delete a file or a folder of Trimtab's own; a missing one is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.is_symlink() or path.exists():  # asked to delete what is not there, a read-only disk complains
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, strict: bool = True, own: Callable[[Path], bool] | None = None) -> None:
    """Write `value` as indented JSON, atomically. Raises InputError for NaN and infinity, which are no JSON, unless
    `strict` is off: what only Python reads again may hold them."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=not strict)
    except ValueError as error:
        raise InputError(f"{path} was not written, NaN and infinity are no JSON: {error}.") from None
    with atomic(path, own=own) as partial:
        partial.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def read_json(path: Path) -> Any:
    """Read JSON. Raises InputError naming the file when it is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: run the stage that writes it (`dvc repro`).") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({error}): delete it and run its stage again.") from None


def read_parquet(path: Path, **options: Any) -> "pl.DataFrame":
    """Read parquet; `options` are those of `polars.read_parquet`. Raises InputError naming the file when it is missing,
    damaged, or lacks a column that `columns` asks for."""
    import polars as pl

    if not path.is_file():
        raise InputError(f"{path} is missing: run the stage that writes it (`dvc repro`).")
    try:
        return pl.read_parquet(path, glob=False, **options)
    except pl.exceptions.ColumnNotFoundError as error:
        reason = f"lacks a column ({str(error).splitlines()[0]})"
    except (OSError, ValueError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        reason = f"is damaged ({(str(error).splitlines() or ['no reason given'])[0]})"
    raise InputError(f"{path} {reason}: delete it and run its stage again.")


def _make_parent(target: Path, asked: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{asked} cannot be written, {target.parent} is no folder: name another path.") from None


def _flush(path: Path) -> None:
    """Put what was written on the disk, and give it the permissions that the user's umask leaves: some libraries write
    files that their owner alone may read."""
    umask = _umask()
    if path.is_dir():
        for folder in [path, *(each for each in path.rglob("*") if each.is_dir())]:
            folder.chmod(0o777 & ~umask)
    for file in [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]:
        file.chmod(file.stat().st_mode | (0o666 & ~umask))
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"^Umask:\s*(\d+)", status.read_text(encoding="utf-8"), re.M)):
        return int(found[1], 8)
    now = os.umask(0)
    os.umask(now)
    return now


def _host() -> str:
    return re.sub(r"[^\w.]", "_", socket.gethostname())[:64]


def _short(name: str) -> str:
    """A name that leaves room for what is put around it: 255 bytes is the most a file name may have."""
    return name if len(name.encode()) <= 100 else f"{fingerprint(name)[:16]}"


def _glob(text: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", text)
