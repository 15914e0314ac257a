"""Run one notebook as a stage: check, execute, record. Success is an exit code of 0 and every declared output."""

import contextlib
import getpass
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat

from trimtab.code import module_digests
from trimtab.errors import InputError
from trimtab.files import check_path, read_json, remove, tree_sha256
from trimtab.pipeline.check import check
from trimtab.pipeline.execution import Execution, Interrupted, execute, signals
from trimtab.pipeline.parameters import collect, parse_notebook
from trimtab.pipeline.places import CLAIMS, Places
from trimtab.pipeline.provenance import commit, describe
from trimtab.pipeline.records import make_record, results_of, write_record
from trimtab.pipeline.results import PROGRESS
from trimtab.pipeline.sections import read_sections
from trimtab.pipeline.terminal import Terminal

RESUME = Path("scratch/resume")
"""Under the root: where notebooks keep their progress."""


def run_notebook(
    notebook: Path,
    record: Path,
    *,
    root: Path,
    sections: Sequence[str],
    settings: Mapping[str, Any],
    outputs: Mapping[str, Path],
    cell_timeout: int | None = None,
) -> int:
    """Execute `notebook` with the given sections of params.yaml and write its record; returns the exit code.

    `settings` are single parameters; `outputs` are parameters too, whose values are paths that must exist afterwards.
    Paths are relative to `root`, which is the kernel's working directory. On any failure the record is marked so and
    the outputs are removed, so that nothing half-made looks complete; the notebook's progress is dropped only when
    record and outputs are on the disk. Raises InputError before the kernel starts, with nothing touched, where
    notebook, sections and settings do not fit together, where any section of the pipeline is wrong, and where record
    or outputs would replace what no run has made.
    """
    refuse_nameless_user()
    content = read_source(root, notebook)
    check(root, sections)
    given = {**settings, **{name: str(path) for name, path in outputs.items()}}
    parameters = collect(content, str(notebook), read_sections(root / "params.yaml", sections), given)
    places = Places(root, notebook, record, outputs)
    with places.alone():
        places.begin()
        try:
            with signals():
                return _run(content, parameters, notebook, sections, places, cell_timeout)
        except BaseException as error:
            places.discard()  # results without a record are none
            if isinstance(error, Interrupted):
                return 128 + error.number
            raise
        finally:
            places.end()


def read_source(root: Path, notebook: Path) -> nbformat.NotebookNode:
    """A stage's notebook. Raises InputError where it is missing or nbformat cannot read it."""
    check_path(notebook)
    try:
        return parse_notebook((root / notebook).read_text(encoding="utf-8"), str(notebook))
    except FileNotFoundError:
        raise InputError(f"{notebook} does not exist under the repository's root.") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise InputError(f"{notebook} is not a notebook that nbformat can read.") from None


def refuse_nameless_user() -> None:
    """DVC asks for the user's name when a stage has ended, and fails without one: raise InputError before it begins."""
    if "DVC_STAGE" in os.environ:
        try:
            getpass.getuser()
        except (KeyError, OSError):
            raise InputError(
                "This user has no name, which DVC needs in the end: set one, such as `export USER=me`."
            ) from None


def _run(
    content: nbformat.NotebookNode,
    parameters: dict[str, Any],
    notebook: Path,
    sections: Sequence[str],
    places: Places,
    cell_timeout: int | None,
) -> int:
    root, record = places.root, places.record
    began, revision = time.monotonic(), commit(root)  # as it is now: somebody may commit while the notebook runs
    library = module_digests(root / notebook)
    progress = root / CLAIMS / f"{places.claim.stem}.progress"
    remove(progress)
    variables = {PROGRESS: str(progress.resolve())}
    with Terminal(record.stem, root / places.log) as terminal:
        terminal.line(f"{notebook} with sections {', '.join(sections)}; parameters {parameters}", shown=False)
        execution = execute(content, parameters, terminal, cwd=root, cell_timeout=cell_timeout, variables=variables)
        results, outputs = _made(execution, places)
        if execution.failure:
            places.discard()
        seconds = time.monotonic() - began
        outcome = f"failed: {execution.failure}" if execution.failure else "complete"
        provenance = describe(
            revision=revision,
            notebook=str(notebook),
            sections=list(sections),
            parameters=parameters,
            seconds=seconds,
            outcome=outcome,
        )
        finished = make_record(
            execution,
            provenance,
            root=root,
            source=notebook.as_posix(),
            parameters=parameters,
            results=results,
            record=_name(record),
            sections=sections,
            outputs=outputs,
            library=library,
        )
        write_record(finished, root / record)
        terminal.line(f"{outcome} after {seconds:.0f} s; record {record}")
    if not execution.failure:
        with contextlib.suppress(OSError):  # the run is whole without it
            drop_progress(root, progress)
    remove(progress)
    return execution.exit_code


def drop_progress(root: Path, listed: Path) -> None:
    """Remove the folders that a run's notebook named as its progress, and what lies beside them under their names."""
    if listed.is_file():
        for line in dict.fromkeys(listed.read_text(encoding="utf-8").splitlines()):
            folder = (root / line).resolve()
            if folder.parent == (root / RESUME).resolve():
                remove(folder)
                for beside in (folder.with_name(f"{folder.name}.lock"), folder.with_name(f"{folder.name}.json")):
                    remove(beside)


def _made(execution: Execution, places: Places) -> tuple[Mapping[str, Any], dict[str, dict[str, str]]]:
    """(what the notebook wrote as its output `results`, path and digest of each output). Sets the execution's failure
    where an output is missing or has no digest, or the results are no metrics and claims."""
    if execution.failure:
        return {}, {}
    try:
        if missing := [str(path) for path in places.outputs.values() if not (places.root / path).exists()]:
            raise InputError(f"every cell ran, but {', '.join(missing)} was not written")
        results = _results(places.root, places.outputs["results"]) if "results" in places.outputs else {}
        sums = {name: tree_sha256(places.root / path) for name, path in places.outputs.items()}
    except InputError as error:
        execution.failure, execution.exit_code = str(error).rstrip("."), 1
        return {}, {}
    return results, {name: {"path": str(places.outputs[name]), "sha256": sum_} for name, sum_ in sums.items()}


def _results(root: Path, path: Path) -> Mapping[str, Any]:
    try:
        return results_of(read_json(root / path))
    except InputError as error:
        raise InputError(f"{path} holds no results: {error}") from None


def _name(record: Path) -> str:
    """`sae/topk-8` of records/sae/topk-8.ipynb; of a record elsewhere its path."""
    named = record.with_suffix("")
    return str(named.relative_to("records")) if named.is_relative_to("records") else str(named)
