"""Files that are either whole or absent, written so that nothing is lost that Trimtab did not make.

A write goes to a neighbour named `.<name>.partial-<host>-<pid>-<token>`, is flushed to disk, and takes its place by a
rename. A process killed at any moment leaves the old file or the new one. A folder that exists is filled file by file:
its hidden mark `.trimtab` lists which files are Trimtab's own, and only those are ever replaced or removed.
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
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import psutil
from filelock import FileLock, Timeout

from trimtab.errors import InputError

if TYPE_CHECKING:
    import polars as pl

FULL = {errno.ENOSPC, errno.EDQUOT}
CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}
MARK = ".trimtab"
"""Hidden file of a folder that Trimtab writes into: by kind of writer, the names of the files that are its own."""


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


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, or of a folder's relative names and contents; the mark of a folder does not
    count. Raises InputError where nothing is there."""
    if path.is_file():
        return file_sha256(path)
    if not path.is_dir():
        raise InputError(f"{path} is missing: run the stage that writes it (`dvc repro`).")
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return fingerprint([[name, file_sha256(path / name)] for name in names if name != MARK])


def fingerprint(value: Any) -> str:
    """Hex SHA-256 of a JSON-serialisable value; equal values give equal digests, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def atomic(
    path: Path, kind: str = "files", *, own: Callable[[Path], bool] | None = None, whole: bool = False
) -> Iterator[Path]:
    """Yield a path to write to, a file or a folder; on success it becomes `path`, on failure nothing is left.

    A folder that exists keeps what is not Trimtab's: files that an earlier write of the same `kind` made are replaced,
    or removed where they are no longer written. `own` tells whether a file that exists may be replaced (default: any);
    with `whole` a folder that exists must hold nothing but what its mark lists.
    Partial writes of processes of this host that are no more are removed on the way. Raises InputError, before
    anything is touched, where a foreign file, a folder or a device is in the place of a file or a file in that of a
    folder; and where the disk is full or may not be written to.
    """
    target = path.resolve() if path.is_dir() else path.absolute()  # a link to a file is replaced itself
    stem = f".{_short(target.name)}.partial-{_host()}-"
    partial = target.parent / f"{stem}{os.getpid()}-{secrets.token_hex(4)}"
    if os.path.lexists(target) and not (target.is_file() or target.is_dir() or target.is_symlink()):
        raise InputError(f"{path} is neither a file nor a folder: name another path.")
    if target.is_file() and own is not None and not own(target):
        raise InputError(f"{path} exists and was not written by Trimtab: name a new file, or remove it first.")
    if whole and target.is_dir() and (foreign := foreign_files(target)):
        raise InputError(f"{path} holds {foreign[0]}, which Trimtab did not write: name a new folder.")
    try:
        _make_parent(target, path)
        for stale in target.parent.glob(f"{_glob(stem)}*"):
            number = stale.name.removeprefix(stem).partition("-")[0]
            if number.isdigit() and not psutil.pid_exists(int(number)):
                remove(stale)
        yield partial
        _flush(partial)
        if partial.is_dir():
            _place_folder(partial, target, path, kind)
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


def own_files(folder: Path) -> dict[str, list[str]]:
    """What the mark of a folder lists, by kind of writer; empty where the folder has no mark."""
    try:
        held = json.loads((folder / MARK).read_text(encoding="utf-8"))
        kinds = {str(kind): [str(name) for name in names] for kind, names in held.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
    return {kind: [name for name in names if _is_inside(name)] for kind, names in kinds.items()}


def foreign_files(folder: Path) -> list[str]:
    """Names of the files of a folder that its mark does not list: Trimtab did not make them."""
    mine = {MARK, *(name for names in own_files(folder).values() for name in names)}
    found = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())
    return sorted(name for name in found if name not in mine)


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


def _place_folder(partial: Path, target: Path, asked: Path, kind: str) -> None:
    """Move what was written to its place; see `atomic`."""
    if target.is_file() or target.is_symlink():
        raise InputError(f"{asked} is a file: name a folder.")
    names = sorted(file.relative_to(partial).as_posix() for file in partial.rglob("*") if not file.is_dir())
    folders = [each.relative_to(partial) for each in sorted(partial.rglob("*")) if each.is_dir()]
    held = own_files(target)
    others = {name for each, files in held.items() if each != kind for name in files}
    before = set(held.get(kind, []))
    for name in names:
        place = target / name
        above = [target / each for each in PurePosixPath(name).parents if str(each) != "."]
        if (os.path.lexists(place) and name not in before | others) or place.is_dir():
            raise InputError(f"{place} exists and was not written by Trimtab: name a new folder, or remove it first.")
        if taken := next((each for each in above if each.is_file()), None):
            raise InputError(f"{taken} is a file where a folder is to be: name a new folder, or remove it first.")
    if not target.exists():
        _mark(partial, {kind: names})
        partial.rename(target)
        return
    _mark(target, held | {kind: sorted(before | set(names))})
    for folder in folders:
        (target / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        (partial / name).replace(target / name)
    for name in before - set(names) - others:
        (target / name).unlink(missing_ok=True)
        for folder in list(Path(name).parents)[:-1]:
            if (target / folder).is_dir() and not any((target / folder).iterdir()):
                (target / folder).rmdir()
    _mark(target, held | {kind: names})


def _mark(folder: Path, kinds: dict[str, list[str]]) -> None:
    new = folder / f"{MARK}-{secrets.token_hex(4)}"
    new.write_text(json.dumps(kinds, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    new.replace(folder / MARK)


def _is_inside(name: str) -> bool:
    """Whether a name of a mark, which anybody may have edited, stays in its folder."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not PurePosixPath(name).is_absolute() and ".." not in parts


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
