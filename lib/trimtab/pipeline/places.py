"""Where a run may write: inside the project, beside nothing of the user's, and over nothing that it did not make."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path

from trimtab.errors import InputError
from trimtab.files import check_path, exclusive, fingerprint, read_json, remove, tree_sha256, write_json
from trimtab.marks import foreign_files, own_files
from trimtab.pipeline.records import is_altered, read_record
from trimtab.pipeline.terminal import LOG

CLAIMS = Path("scratch/runs")
"""Under the root: what a run that has begun and not ended is making, so that after a `kill -9` the next may replace it.
Locks lie beside."""
SOURCES = ("dvc.yaml", "dvc.lock", "params.yaml", "conf", "lib", "tests", "benchmarks", "notebooks", ".git", ".dvc")


class Places:
    """The record and the outputs of one run, by which it claims them. Paths are relative to `root`."""

    def __init__(self, root: Path, notebook: Path, record: Path, outputs: Mapping[str, Path]) -> None:
        """Raises InputError where one of them lies outside the root, holds or is a source, or holds another of them,
        and for a path that no file can have."""
        for path in (record, *outputs.values()):
            check_path(path)
        if record.suffix != ".ipynb":
            raise InputError(f"The record {str(record)!r} is no notebook: give a path that ends in .ipynb.")
        self.root, self.record = root.absolute(), Path(os.path.normpath(record))
        self.log = self.record.with_suffix(".log")
        self.outputs = dict(outputs)
        self.claim = self.root / CLAIMS / f"{fingerprint(str(self.record))[:16]}.json"
        named = {f"output `{name}`": path for name, path in outputs.items()}
        named |= {"record": record, "log": self.log}
        sources = [notebook, *map(Path, SOURCES), *self.root.glob("*.md")]
        places = {name: self._inside(name, path) for name, path in named.items()}
        for name, place in places.items():
            for source in (self._absolute(each) for each in sources):
                if _holds(place, source) or (source.is_dir() and _holds(source, place)):
                    raise InputError(
                        f"The {name} of {notebook} may not be {named[name]}, which would replace "
                        f"{os.path.relpath(source, self.root)}: name a path of its own, such as data/NAME."
                    )
            for other, second in places.items():
                if other != name and _holds(place, second):
                    raise InputError(f"The {name} and the {other} of {notebook} lie in one another: {named[name]}.")

    def alone(self) -> AbstractContextManager[None]:
        """Hold all of them against other runs; see `files.exclusive`."""
        names = [self.record, self.log, *(Path(os.path.normpath(each)) for each in self.outputs.values())]
        return exclusive(names, self.root / CLAIMS)

    def begin(self) -> None:
        """Claim the outputs, and remove what an earlier run left of record and outputs. Raises InputError, and touches
        nothing, where one of them is there and was not made by a run of this record."""
        self._refuse_foreign()
        claimed = {"record": str(self.record), "outputs": sorted(map(str, self.outputs.values()))}
        write_json(self.claim, claimed)
        remove(self.root / self.record)
        self.discard()

    def discard(self) -> None:
        """Remove the outputs, so that nothing half-made looks complete."""
        for path in self.outputs.values():
            remove(self.root / path)

    def end(self) -> None:
        """The record tells of the outputs from now on, or there are none."""
        remove(self.claim)

    def _absolute(self, path: Path) -> Path:
        return Path(os.path.normpath(self.root / path))

    def _inside(self, name: str, path: Path) -> Path:
        place = self._absolute(path)
        if not _holds(self.root, place) or place == self.root or _holds(place.resolve(), self.root.resolve()):
            given = "empty" if path == Path() else f"{path}, which is not inside the project"
            raise InputError(f"The {name} is {given}: name a path inside {self.root}, such as data/NAME.")
        if taken := next((each for each in place.parents if each.is_file()), None):
            raise InputError(f"The {name} {path} would lie below {taken}, which is a file: name another path.")
        return place

    def _refuse_foreign(self) -> None:
        record = self.root / self.record
        made: Mapping[str, str] = {}
        if os.path.lexists(record):
            try:
                held = read_record(record)
                made = {each["path"]: each["sha256"] for each in held.metadata["trimtab"].get("outputs", {}).values()}
                as_made = not is_altered(held)
            except InputError:
                as_made = False
            if not as_made and self._declared is None:
                raise InputError(f"{self.record} exists and is not as a run made it: name another, or remove it first.")
        if (self.root / self.log).is_dir() or not (_is_log(self.root / self.log) or self._declared is not None):
            raise InputError(f"{self.log} exists and is no log of a run: name another record, or remove it first.")
        claim = read_json(self.claim) if self.claim.is_file() else {}
        claimed = claim["outputs"] if claim.get("record") == str(self.record) else []
        for path in self.outputs.values():
            place = self.root / path
            if not os.path.lexists(place) or str(path) in claimed:
                continue
            if place.is_dir() and place.is_symlink():
                raise InputError(f"{path} is a link to a folder, which a run would replace: name another output.")
            if place.is_dir() and (own_files(place) or not any(place.iterdir())):
                if foreign := foreign_files(place):
                    raise InputError(f"{path} holds {foreign[0]}, which no run made as it is: name another output.")
                continue
            if path.as_posix() in (self._declared or ()):
                continue
            if str(path) not in made or made[str(path)] != tree_sha256(place):
                raise InputError(f"{path} exists and was not made by this notebook: name another, or remove it first.")

    @cached_property
    def _declared(self) -> set[str] | None:
        """What the pipeline's stage of this record declares as outputs: DVC knows them, and removes them itself before
        a run. None where no stage has this record."""
        from trimtab.pipeline.stages import stages

        try:
            mine = [each.outs for each in stages(self.root) if each.record == self.record.as_posix()]
        except InputError:
            return None
        return set(mine[0]) if mine else None


def _holds(folder: Path, path: Path) -> bool:
    """Whether they are the same, or `path` lies in `folder`; links count as what they lead to as well."""
    return path.is_relative_to(folder) or path.resolve().is_relative_to(folder.resolve())


def _is_log(path: Path) -> bool:
    """Whether a log may be written there: nothing is there, or a log of an earlier run."""
    if not os.path.lexists(path):
        return True
    with path.open("rb") as file:
        return file.read(len(LOG)) in (b"", LOG.encode())
