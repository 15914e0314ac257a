"""The state of every stage: whether its record still says what dvc.lock says, and dvc.lock what the sources say."""

from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml.error import YAMLError

from trimtab.errors import InputError
from trimtab.pipeline.parameters import parse_yaml
from trimtab.pipeline.records import read_record

State = Literal["fresh", "stale", "never run", "missing", "failed", "altered"]


@dataclass(frozen=True)
class Condition:
    """A stage of the pipeline and its record."""

    stage: str
    """As DVC names it: `sae@topk-8`."""
    record: str | None
    """Path under records/ without suffix; None: the stage leaves none."""
    state: State
    """fresh: what is there was made from what is there. stale: sources, parameters or data have changed since. altered:
    a record or results that no run has written. missing: dvc.lock has it, or what it was made from, and the working
    tree has not, as in a fresh clone."""
    reasons: tuple[str, ...] = ()

    def has_record(self, root: Path) -> bool:
        """Whether its record is in the working tree."""
        return self.record is not None and (root / f"records/{self.record}.ipynb").is_file()


def conditions(root: Path) -> list[Condition]:
    """Of every stage that the pipeline has now, in the order of dvc.yaml. Raises InputError where another DVC process
    holds the repository."""
    from dvc.lock import LockError
    from dvc.repo import Repo

    locked = _locked(root)
    with chdir(root), Repo(str(root)) as repo:  # DVC names stages and files as seen from the working directory
        try:
            changed = repo.status()
        except LockError:
            raise InputError("Another `dvc` runs here: wait for it, or stop it.") from None
        here = root.resolve()
        stages = [(s.addressing, [Path(out.fs_path).relative_to(here) for out in s.outs]) for s in repo.index.stages]
    made = [out for _, outs in stages for out in outs]
    return [_condition(root, name, outs, changed.get(name, []), locked.get(name), made) for name, outs in stages]


def _condition(
    root: Path,
    stage: str,
    outs: Sequence[Path],
    changes: Sequence[str | Mapping[str, Any]],
    locked: Mapping[str, Any] | None,
    made: Sequence[Path],
) -> Condition:
    written = next((path for path in outs if path.suffix == ".ipynb"), None)
    name = str(written.relative_to("records").with_suffix("")) if written else None
    file = root / written if written else None
    told = [each for each in changes if isinstance(each, Mapping)]
    inputs = [item for each in told for item in each.get("changed deps", {}).items()]
    outputs = dict(item for each in told for item in each.get("changed outs", {}).items())
    if file and file.is_file():
        try:
            about = read_record(file).metadata["trimtab"]
        except InputError as error:
            return Condition(stage, name, "altered", (str(error),))
        if about["status"] != "complete":
            return Condition(stage, name, "failed", (f"its last run failed: see {written}",))
    if locked is None:
        return Condition(stage, name, "never run", (f"make it with `dvc repro {stage}`",))
    altered = [f"{path} is not what its run wrote" for path, how in outputs.items() if how == "modified"]
    if file and file.is_file() and not altered:
        altered = _parameters_differ(about.get("parameters"), locked.get("params", {}).get("params.yaml", {}))
    if altered:
        return Condition(stage, name, "altered", tuple(altered))
    missing = [str(path) for path in outs if not (root / path).exists()]
    gone = [path for path, how in inputs if how == "deleted" and _of_a_stage(Path(path), made)]
    stale = [_input(path, how) for path, how in inputs if path not in gone]
    stale += [str(each) for each in changes if isinstance(each, str)]
    if not stale and (missing or gone):  # else what a cache holds is not what is wanted
        remedy = (
            "brought back by `dvc checkout`, `dvc pull` or, where committed, `git checkout`; made anew by `dvc repro`"
        )
        return Condition(stage, name, "missing", (f"{', '.join(missing or gone)}: {remedy}",))
    stale += [f"{path} deleted" for path in (*gone, *missing)]
    lost = [path for path, how in outputs.items() if how == "not in cache" and path not in missing]
    stale += [f"{path} is not in DVC's cache" for path in lost]
    return Condition(stage, name, "stale" if stale else "fresh", tuple(stale))


def _of_a_stage(path: Path, made: Sequence[Path]) -> bool:
    """Whether a stage makes it, what holds it, or part of it."""
    return any(path.is_relative_to(out) or out.is_relative_to(path) for out in made)


def _input(path: str, how: str | Mapping[str, str]) -> str:
    if isinstance(how, Mapping):  # of params.yaml: section -> how
        return f"{path}: {', '.join(f'section {section} {kind}' for section, kind in how.items())}"
    return f"{path} {how}"


def _parameters_differ(found: Mapping[str, Any] | None, sections: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the record has been run with beside what dvc.lock says; records from before they knew prove nothing."""
    if found is None:
        return []
    given = {key: value for values in sections.values() for key, value in values.items()}
    differ = [key for key, value in given.items() if key not in found or found[key] != value]
    return [f"the record was run with {key} = {found.get(key)!r}, dvc.lock has {given[key]!r}" for key in differ]


def _locked(root: Path) -> dict[str, Any]:
    try:
        return parse_yaml((root / "dvc.lock").read_text())["stages"]
    except FileNotFoundError:
        return {}
    except (YAMLError, KeyError, TypeError):
        raise InputError(f"{root}/dvc.lock is not what DVC writes: take the committed one (`git checkout`).") from None
