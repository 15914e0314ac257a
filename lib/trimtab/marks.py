"""The hidden mark `.trimtab` of a folder that Trimtab writes into: it lists Trimtab's own files with their digests, and
only what is still as listed is ever replaced or removed."""

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from trimtab.errors import InputError

MARK = ".trimtab"
"""Hidden file of a folder that Trimtab writes into: by kind of writer, names and digests of the files it wrote. A list
of names, without digests, is what earlier versions wrote, and what stands there while a folder is being filled."""
Mark = dict[str, dict[str, str | None]]


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def own_files(folder: Path) -> Mark:
    """What the mark of a folder lists; empty where there is none. Raises InputError where something that Trimtab did
    not write bears the mark's name."""
    mark = folder / MARK
    if not os.path.lexists(mark):
        return {}
    try:
        text = mark.read_text(encoding="utf-8")
        kinds = json.loads(text)
        named = all(isinstance(held, list | dict) and all(map(_is_inside, held)) for held in kinds.values())
        if kinds and named and text == _mark_text(kinds):
            return {kind: dict(held) if isinstance(held, dict) else dict.fromkeys(held) for kind, held in kinds.items()}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        pass
    raise InputError(f"{mark} was not written by Trimtab, as its name says: name another folder, or move it away.")


def foreign_files(folder: Path) -> list[str]:
    """Names of what in a folder is not, or is no longer, as its mark lists it: files, links, and folders that hold
    nothing."""
    mark = own_files(folder)
    return [name for name in contents(folder) if not _is_own(folder, name, mark)]


def contents(folder: Path) -> list[str]:
    """Relative names of what a folder holds, but for its mark: files, links, and folders that hold nothing."""
    found = (each for each in folder.rglob("*") if each.is_symlink() or not each.is_dir() or not any(each.iterdir()))
    return sorted(name for each in found if (name := each.relative_to(folder).as_posix()) != MARK)


def sha256(path: Path) -> str | None:
    """Digest of a file's bytes; empty for a folder that holds nothing; None for what can have none."""
    if path.is_file():
        return file_sha256(path)
    return "" if path.is_dir() and not path.is_symlink() and not any(path.iterdir()) else None


def fill(partial: Path, target: Path, asked: Path, kind: str, own: Callable[[Path], bool] | None) -> None:
    """Move what was written to its place; see `files.atomic`. Raises InputError before anything is touched."""
    if target.is_file() or target.is_symlink():
        raise InputError(f"{asked} is a file: name a folder.")
    mark = own_files(target)
    before, others = mark.get(kind, {}), {name for each, held in mark.items() if each != kind for name in held}
    new = {name: sha256(partial / name) for name in contents(partial)}
    stale = before.keys() - new.keys() - others
    for name in [*new, *sorted(stale)]:
        place = target / name
        mine = _is_own(target, name, mark) or (own is not None and place.is_file() and own(place))
        if os.path.lexists(place) and not mine:
            listed = name in others | before.keys()
            what = "has been changed since Trimtab wrote it" if listed else "exists and was not written by Trimtab"
            raise InputError(f"{place} {what}: name a new folder, or remove it first.")
        above = [target / each for each in PurePosixPath(name).parents if str(each) != "."]
        if taken := next((each for each in above if each.is_file() or each.is_symlink()), None):
            raise InputError(
                f"{taken} is a file or a link where a folder is to be: name a new one, or remove it first."
            )
    if not target.exists():
        _write_mark(partial, {kind: new})
        partial.rename(target)
        return
    _write_mark(target, mark | {kind: dict.fromkeys([*before, *new])})
    for name in new:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).replace(target / name)
    for name in stale:
        if (target / name).is_dir():
            (target / name).rmdir()
        else:
            (target / name).unlink(missing_ok=True)
        for folder in list(Path(name).parents)[:-1]:
            if (target / folder).is_dir() and not any((target / folder).iterdir()):
                (target / folder).rmdir()
    _write_mark(target, mark | {kind: new})


def _is_own(folder: Path, name: str, mark: Mark) -> bool:
    """Whether a file of a folder is as one of its writers left it."""
    sums = {held[name] for held in mark.values() if name in held}
    return (folder / name).is_file() if None in sums else sha256(folder / name) in sums


def _write_mark(folder: Path, mark: Mark) -> None:
    new = folder / f"{MARK}-{secrets.token_hex(4)}"
    new.write_text(_mark_text(mark), encoding="utf-8")
    new.replace(folder / MARK)


def _mark_text(mark: Any) -> str:
    return json.dumps(mark, indent=1, sort_keys=True) + "\n"


def _is_inside(name: Any) -> bool:
    """Whether a name of a mark, which anybody may have edited, stays in its folder."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not PurePosixPath(name).is_absolute() and ".." not in parts
