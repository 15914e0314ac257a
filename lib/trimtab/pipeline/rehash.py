"""`trimtab records verify --deep`: outputs and DVC's cache, read byte for byte, against the digests of dvc.lock and of
records. DVC itself looks at times and sizes of files where it has seen them before, and never at its own cache."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trimtab.errors import InputError
from trimtab.files import tree_sha256
from trimtab.pipeline.records import is_altered, read_record

CACHE = "DVC's cache"


def damaged_of(
    repo: Any, root: Path, outs: Iterable[Path], locked: Mapping[str, Any], changed: Iterable[Path]
) -> list[str]:
    """What of a stage is not what its digests say; of outputs that DVC itself finds `changed` only the cache is read.
    `repo`: DVC's; `locked`: the stage in dvc.lock."""
    cache = repo.cache.local

    def files(folder: Path) -> list[Path]:
        return [Path(each) for each in repo.dvcignore.find(cache.fs, str(folder))]

    found: list[str] = []
    for out in locked.get("outs", []):
        if isinstance(out, dict) and out.get("hash") == "md5" and isinstance(out.get("md5"), str):
            path = Path(str(out.get("path")))
            here = None if path in set(changed) or not (root / path).exists() else root / path
            told = _damaged(here, out["md5"], lambda oid: Path(cache.oid_to_path(oid)), files)
            found += [each if each.startswith(CACHE) else f"{path / each} is not what its run wrote" for each in told]
    return list(dict.fromkeys([*found, *_beside_record(root, outs, set(changed))]))


def _damaged(
    here: Path | None, digest: str, stored: Callable[[str], Path], files: Callable[[Path], list[Path]]
) -> Iterator[str]:
    """Names of files within `here` ("." for itself) that differ, and of objects of the cache that are damaged."""
    kept = stored(digest)
    sound = not kept.is_file() or _md5(kept) == digest.removesuffix(".dir")
    if not sound:
        yield _object(kept)
    if not digest.endswith(".dir"):
        if here and (here.is_dir() or _md5(here) != digest):
            yield "."
        return
    listed = _listed(kept) if sound and kept.is_file() else None
    for oid in {each["md5"] for each in listed or ()}:
        if stored(oid).is_file() and _md5(stored(oid)) != oid:
            yield _object(stored(oid))
    if here is None:
        return
    found = {path.relative_to(here).as_posix(): _md5(path) for path in files(here)} if here.is_dir() else {}
    if listed is None:
        entries = [{"md5": found[name], "relpath": name} for name in sorted(found)]
        if hashlib.md5(json.dumps(entries, sort_keys=True).encode()).hexdigest() != digest.removesuffix(".dir"):
            yield "."
        return
    expected = {each["relpath"]: each["md5"] for each in listed}
    yield from sorted(name for name in {**expected, **found} if expected.get(name) != found.get(name))


def _listed(path: Path) -> list[dict[str, str]]:
    return [{"md5": each["md5"], "relpath": each["relpath"]} for each in json.loads(path.read_text(encoding="utf-8"))]


def _object(path: Path) -> str:
    return f"{CACHE} is damaged at {path}: delete that file, then `dvc pull`, or `dvc repro --force`"


def _beside_record(root: Path, outs: Iterable[Path], changed: set[Path]) -> Iterator[str]:
    """Outputs that are not those of which the stage's own record has the digest."""
    record = next((path for path in outs if path.suffix == ".ipynb"), None)
    if record is None or record in changed:
        return
    try:
        held = read_record(root / record)
    except InputError:
        return  # its state says so
    if is_altered(held):
        return
    for output in held.metadata["trimtab"].get("outputs", {}).values():
        path = root / output["path"]
        if path.exists() and Path(output["path"]) not in changed and tree_sha256(path) != output["sha256"]:
            yield f"{output['path']} is not what its record says that its run wrote"


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
