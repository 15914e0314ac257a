"""Run one notebook as a stage: check, execute, record. Success is an exit code of 0 and every declared output."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat

from trimtab.errors import InputError
from trimtab.files import read_json, remove
from trimtab.pipeline.execution import execute
from trimtab.pipeline.parameters import collect, read_sections
from trimtab.pipeline.provenance import commit, describe
from trimtab.pipeline.records import make_record, write_record
from trimtab.pipeline.terminal import Terminal


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
    the outputs are removed, so that nothing half-made looks complete. Raises InputError before the kernel starts where
    notebook, sections and settings do not fit together.
    """
    source = str(notebook)
    try:
        content = nbformat.read(root / notebook, as_version=4)
        nbformat.validate(content)
    except FileNotFoundError:
        raise InputError(f"{notebook} does not exist under the repository's root.") from None
    except (
        nbformat.reader.NotJSONError,
        nbformat.ValidationError,
        AttributeError,
        KeyError,
        TypeError,
        IsADirectoryError,
    ):
        raise InputError(f"{notebook} is not a notebook that nbformat can read.") from None
    given = {**settings, **{name: str(path) for name, path in outputs.items()}}
    parameters = collect(content, source, read_sections(root / "params.yaml", sections), given)

    def discard() -> None:
        for path in outputs.values():
            remove(root / path)

    remove(root / record)
    discard()
    began, revision = time.monotonic(), commit(root)  # as it is now: somebody may commit while the notebook runs
    with Terminal(record.stem, (root / record).with_suffix(".log")) as terminal:
        terminal.line(f"{source} with sections {', '.join(sections)}; parameters {parameters}", shown=False)
        execution = execute(content, parameters, terminal, cwd=root, cell_timeout=cell_timeout)
        if not execution.failure:
            missing = [str(path) for path in outputs.values() if not (root / path).exists()]
            if missing:
                execution.failure = f"every cell ran, but {', '.join(missing)} was not written"
                execution.exit_code = 1
        if execution.failure:
            discard()
        seconds = time.monotonic() - began
        outcome = f"failed: {execution.failure}" if execution.failure else "complete"
        provenance = describe(
            revision=revision,
            notebook=source,
            sections=list(sections),
            parameters=parameters,
            seconds=seconds,
            outcome=outcome,
        )
        results = {} if execution.failure or "results" not in outputs else read_json(root / outputs["results"])
        finished = make_record(execution, provenance, root=root, source=source, parameters=parameters, results=results)
        try:
            write_record(finished, root / record)
        except InputError:  # no room for it: results without a record are none
            discard()
            raise
        terminal.line(f"{outcome} after {seconds:.0f} s; record {record}")
    return execution.exit_code
