"""The state of every stage: whether its record still says what dvc.lock says, and dvc.lock what the sources say."""

from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from nbformat import NotebookNode

from trimtab.code import module_digests
from trimtab.errors import InputError
from trimtab.files import read_json, tree_sha256
from trimtab.pipeline.normalising import plain
from trimtab.pipeline.records import is_altered, read_record
from trimtab.pipeline.sections import parse_yaml
from trimtab.pipeline.stages import Stage, stages

State = Literal["fresh", "stale", "never run", "missing", "of another commit", "failed", "altered"]
BACK = "brought back by `dvc checkout`, `dvc pull` or, where committed, `git checkout`; made anew by `dvc repro`"


@dataclass(frozen=True)
class Condition:
    """A stage of the pipeline and its record."""

    stage: str
    """As DVC names it: `sae@topk-8`."""
    record: str | None
    """Path under records/ without suffix; None: the stage leaves none."""
    state: State
    """fresh: what is there was made from what is there. stale: sources, parameters, data or the library have changed
    since. altered: a record or results that no run has written. of another commit: a run wrote them, but not the one
    that dvc.lock tells of. missing: dvc.lock has it, or what it was made from, and the working tree has not, as in a
    fresh clone."""
    reasons: tuple[str, ...] = ()
    remedy: str = ""
    """The command that helps, where it is not `dvc repro STAGE`."""

    @property
    def command(self) -> str:
        """What makes it fresh."""
        return self.remedy or f"dvc repro {self.stage}"

    def has_record(self, root: Path) -> bool:
        """Whether its record is in the working tree."""
        return self.record is not None and (root / f"records/{self.record}.ipynb").is_file()


@dataclass
class _Seen:
    """What DVC sees of the pipeline."""

    outs: Mapping[str, Sequence[Path]]
    """By stage."""
    changes: Mapping[str, Sequence[str | Mapping[str, Any]]]
    """By stage, as `dvc status` has them."""
    modified: Mapping[str, Sequence[Path]]
    """By stage, the outputs that are there and not those of dvc.lock."""
    cached: set[Path]
    """Those of them whose content DVC's cache holds: some run made them."""
    damaged: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By stage: files whose bytes are not what DVC takes them for; see `rehash`."""

    @property
    def made(self) -> list[Path]:
        return [out for outs in self.outs.values() for out in outs]


def conditions(root: Path, *, deep: bool = False) -> list[Condition]:
    """The condition of every stage that the pipeline has now, in the order of dvc.yaml. `deep`: read every byte of
    outputs and of DVC's cache anew, and trust no file times. Raises InputError where another DVC process holds the
    repository, and where the pipeline's files are broken."""
    locked = _locked(root)
    defined = {stage.name: stage for stage in stages(root)}
    seen = _see(root, locked, deep)
    digests: dict[str, dict[str, str]] = {}
    found = []
    for name in seen.outs:
        each = _Examined(root, name, seen, defined.get(name), locked.get(name), digests).condition()
        if damaged := seen.damaged.get(name):
            known = each.reasons if each.state in ("altered", "failed") else ()
            each = replace(each, state="altered", reasons=(*known, *damaged), remedy="")
        found.append(each)
    return found


def _see(root: Path, locked: Mapping[str, Any], deep: bool) -> _Seen:
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo

    here = root.resolve()
    try:
        with chdir(root), Repo(str(root)) as repo:  # DVC names stages and files as seen from the working directory
            changes = repo.status()
            index = {stage.addressing: {Path(o.fs_path).relative_to(here): o for o in stage.outs}
                     for stage in repo.index.stages}  # fmt: skip
            modified: dict[str, list[Path]] = {}
            cached = set()
            for stage, told in changes.items():
                for path in map(Path, _outputs(told, "")):
                    # Where the cache lacks what was wanted, DVC does not say that something else is there.
                    if path in index[stage] and (root / path).exists() and index[stage][path].changed_checksum():
                        out = index[stage][path]
                        modified.setdefault(stage, []).append(path)
                        if out.use_cache and out.cache.exists(out.get_hash().value):
                            cached.add(path)
            damaged: dict[str, list[str]] = {}
            if deep:
                from trimtab.pipeline.rehash import damaged_of

                damaged = {
                    stage: damaged_of(repo, here, outs, locked.get(stage, {}), modified.get(stage, []))
                    for stage, outs in index.items()
                }
    except LockError:
        raise InputError("Another `dvc` runs here: wait for it, or stop it.") from None
    except DvcException as error:
        raise InputError(f"DVC cannot read the pipeline: {' '.join(str(error).split())}") from None
    return _Seen({stage: list(outs) for stage, outs in index.items()}, changes, modified, cached, damaged)


@dataclass
class _Examined:
    """One stage, with all that is known of it."""

    root: Path
    name: str
    seen: _Seen
    stage: Stage | None
    locked: Mapping[str, Any] | None
    digests: dict[str, dict[str, str]]
    """Digests of the modules behind each notebook; filled as they are needed."""

    def condition(self) -> Condition:
        outs, changes = self.seen.outs[self.name], self.seen.changes.get(self.name, [])
        written = next((path for path in outs if path.suffix == ".ipynb"), None)
        record_name = str(written.relative_to("records").with_suffix("")) if written else None

        def condition(state: State, *reasons: str, remedy: str = "") -> Condition:
            return Condition(self.name, record_name, state, reasons, remedy)

        record: NotebookNode | None = None
        about: Mapping[str, Any] = {}
        if written and (self.root / written).is_file():
            try:
                record = read_record(self.root / written)
            except InputError as error:
                return condition("altered", str(error))
            about = record.metadata["trimtab"]
            if is_altered(record):
                return condition("altered", f"{written} is not what its run wrote: its digest does not fit")
            if about["status"] != "complete":
                return condition("failed", f"its last run failed: see {written}")
            if about.get("record", record_name) != record_name:
                return condition("altered", f"{written} is the record of {about['record']}")
        if self.locked is None:
            return condition("never run", f"make it with `dvc repro {self.name}`")
        modified = self.seen.modified.get(self.name, [])
        foreign = [path for path in modified if not self._was_run(path, written, about)]
        if foreign:
            return condition("altered", *(f"{path} is not what its run wrote" for path in foreign))
        if modified:
            return condition("of another commit", _elsewhere(modified), remedy="dvc checkout")
        if about and (differ := self._disagreements(about, "changed command" in changes)):
            return condition("altered", *differ)
        told = [each for each in changes if isinstance(each, Mapping)]
        inputs = [item for each in told for item in each.get("changed deps", {}).items()]
        missing = [path for path in outs if not (self.root / path).exists()]
        gone = [path for path, how in inputs if how == "deleted" and _overlaps(Path(path), self.seen.made)]
        elsewhere = [path for path, how in inputs if how == "modified" and _overlaps(Path(path), self.seen.cached)]
        stale = [_input(path, how) for path, how in inputs if path not in (*gone, *elsewhere)]
        stale += [str(each) for each in changes if isinstance(each, str)]
        if not stale and (missing or gone):  # else what a cache holds is not what is wanted
            names = ", ".join(map(str, missing or gone))
            return condition("missing", f"{names}: {BACK}")
        if not stale and elsewhere:
            return condition("of another commit", _elsewhere(map(Path, elsewhere)), remedy="dvc checkout")
        stale += [f"{path} modified" for path in elsewhere]
        stale += [f"{path} deleted" for path in (*gone, *missing)]
        lost = [path for path in _outputs(changes, "not in cache") if Path(path) not in missing]
        stale += [f"{path} is not in DVC's cache" for path in lost]
        if stale:
            return condition("stale", *stale)
        if about and (changed := self._library_differs(about)):
            force = f"dvc repro --force {self.name}"
            return condition("stale", f"{changed}: `{force}`", remedy=force)
        return condition("fresh")

    def _was_run(self, path: Path, record: Path | None, about: Mapping[str, Any]) -> bool:
        """Whether some run made an output as it is, though not the run that dvc.lock tells of: DVC's cache has it, or
        a record that nobody altered says so."""
        if path in self.seen.cached:
            return True
        if record is None or "digest" not in about:
            return False
        if path == record:
            return True
        if path == record.with_suffix(".log"):  # two equal runs differ in it, and no record has its digest
            return record in self.seen.modified[self.name]
        made = {output["path"]: output["sha256"] for output in about["outputs"].values()}
        return made.get(path.as_posix()) == tree_sha256(self.root / path)

    def _disagreements(self, about: Mapping[str, Any], other_command: bool) -> list[str]:
        """What the record says of itself beside dvc.lock, the stage's command and the results' file. Early records say
        less."""
        sections = (self.locked or {}).get("params", {}).get("params.yaml", {})
        stage = None if other_command else self.stage  # another command would be held against the record of the old one
        given = {key: value for values in sections.values() for key, value in values.items()}
        given |= {**stage.settings, **stage.outputs} if stage else {}
        found, differ = about.get("parameters"), []
        if found is not None:
            for key, value in given.items():
                if key not in found or plain(found[key]) != plain(value):
                    which = "its stage" if stage and key in {**stage.settings, **stage.outputs} else "dvc.lock"
                    differ.append(f"the record was run with {key} = {found.get(key)!r}, {which} has {value!r}")
        if stage and "digest" in about:
            if found is not None and set(stage.sections) <= set(sections):
                extra = [key for key in found if key not in given]
                differ += [f"the record was run with {key}, which its stage does not give" for key in extra]
            told = {name: output["path"] for name, output in about["outputs"].items()}
            for what, here, there in (
                ("notebook", about["notebook"], stage.notebook),
                ("sections", about["sections"], stage.sections),
                ("outputs", told, stage.outputs),
            ):
                if here != there:
                    differ.append(f"the {what} of the record: {here!r}, of its stage: {there!r}")
        results = stage.outputs.get("results") if stage else None
        if results and "results" in about and (self.root / results).is_file():
            try:
                same = plain(read_json(self.root / results)) == plain(about["results"])
            except InputError as error:
                return [*differ, str(error)]
            if not same:
                differ.append(f"{results} is not what the record says that its run found")
        return differ

    def _library_differs(self, about: Mapping[str, Any]) -> str:
        """Which modules of the library behave otherwise than when the record was made; empty: none."""
        if self.stage is None or self.stage.notebook is None:
            return ""
        if "library" not in about:
            return "its record is an early one, which does not say what the library was"
        notebook = self.stage.notebook
        if notebook not in self.digests:
            self.digests[notebook] = module_digests(self.root / notebook)
        before, now = about["library"], self.digests[notebook]
        changed = sorted(name for name in {**before, **now} if before.get(name) != now.get(name))
        if not changed:
            return ""
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        verb = "has" if len(changed) == 1 else "have"
        return f"{', '.join(changed[:3])}{more} {verb} changed behaviour since"


def _outputs(changes: Sequence[str | Mapping[str, Any]], how: str) -> list[str]:
    """Outputs that `dvc status` says something of; `how`: only where it says that."""
    told = [each.get("changed outs", {}) for each in changes if isinstance(each, Mapping)]
    return [path for each in told for path, said in each.items() if not how or said == how]


def _overlaps(path: Path, others: Sequence[Path] | set[Path]) -> bool:
    """Whether it is one of them, holds one, or is part of one."""
    return any(path.is_relative_to(other) or other.is_relative_to(path) for other in others)


def _elsewhere(paths: Sequence[Path] | Any) -> str:
    names = ", ".join(map(str, paths))
    return f"{names}: made by another run than that of dvc.lock, which `dvc checkout` brings back"


def _input(path: str, how: str | Mapping[str, str]) -> str:
    if isinstance(how, Mapping):  # of params.yaml: section -> how
        return f"{path}: {', '.join(f'section {section} {kind}' for section, kind in how.items())}"
    return f"{path} {how}"


def _locked(root: Path) -> dict[str, Any]:
    try:
        held = parse_yaml((root / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    except FileNotFoundError:
        return {}
    except (InputError, KeyError, TypeError, UnicodeDecodeError):
        held = None
    if not isinstance(held, dict) or not all(isinstance(each, dict) for each in held.values()):
        raise InputError(f"{root}/dvc.lock is not what DVC writes: take the committed one (`git checkout`).")
    return held
