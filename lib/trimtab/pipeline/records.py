"""Executed notebooks as records: what differs between two equal runs is confined to one provenance cell."""

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from trimtab.claims import Verdict
from trimtab.errors import InputError
from trimtab.files import atomic, fingerprint
from trimtab.markup import visible
from trimtab.pipeline.execution import Execution, was_executed
from trimtab.pipeline.normalising import DEEPEST, Cleaner, plain

FORMAT = 2
"""Version of the metadata that a record has about itself. Format 1 has no digest; early records have no metadata."""
PROVENANCE, BANNER = "provenance", "failure"
# The kernel's own description carries version numbers; those belong to the provenance cell.
KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
_BROKEN = (
    ValueError,
    nbformat.ValidationError,
    AttributeError,
    KeyError,
    TypeError,
    IndexError,
    AssertionError,
    RecursionError,
)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class _Judged(_Strict, extra="forbid"):
    claim: Verdict


class Results(_Strict):
    """What a stage found; all of it may be missing, as in a failed run."""

    metrics: dict[str, Any] = {}
    claims: list[dict[str, Any]] = []

    @field_validator("claims")
    @classmethod
    def _are_verdicts(cls, claims: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for claim in claims:
            _Judged.model_validate_json(json.dumps({"claim": claim}))
        return claims


class Output(_Strict):
    """One output of a run."""

    path: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class About(_Strict):
    """What a record says of itself, in its metadata as `trimtab`."""

    format: int = 0
    status: Literal["complete", "failed"]
    notebook: str
    parameters: dict[str, Any] = {}
    results: Results = Results()


class Signed(About):
    """The same since format 2."""

    format: Literal[2]
    parameters: dict[str, Any]
    results: Results
    record: str
    """Name, as `sae/topk-8`."""
    sections: list[str]
    outputs: dict[str, Output]
    library: dict[str, str]
    """Digests of the modules behind the notebook; see `code.module_digests`."""
    digest: str
    """Digest of the cells and of the rest of this."""


def make_record(
    execution: Execution,
    provenance: str,
    *,
    root: Path,
    source: str,
    parameters: Mapping[str, Any],
    results: Mapping[str, Any],
    record: str = "",
    sections: Sequence[str] = (),
    outputs: Mapping[str, Mapping[str, str]] | None = None,
    library: Mapping[str, str] | None = None,
) -> NotebookNode:
    """Normalise an executed notebook and add provenance; a failed one says so at its top, and which cells never ran.

    Time stamps, durations, random names, papermill's metadata and the paths of this machine are removed. What the run
    was given and what it found is in the metadata too, so that a record can be compared wherever it lies: `record` is
    its name, `outputs` have {name: {path, sha256}}, `library` digests of the modules behind the notebook.
    """
    notebook = execution.notebook
    status = "failed" if execution.failure else "complete"
    cleaner = Cleaner(root)
    for index, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        cell.id = f"cell-{index:03d}"
        if cell.cell_type != "code":
            continue
        if execution.failure:
            ran = was_executed(cell) and index != execution.current
            broke = index == execution.current or any(o.output_type == "error" for o in cell.outputs)
            cell.metadata["trimtab"] = {"status": "failed" if broke else "complete" if ran else "not run"}
        cell.outputs = cleaner.outputs(cell.outputs)
    injected = [i for i, cell in enumerate(notebook.cells) if "injected-parameters" in cell.metadata.get("tags", [])]
    place = injected[0] + 1 if injected else 1
    notebook.cells.insert(place, _markdown(provenance, "provenance", PROVENANCE))
    if execution.failure:
        _mark_failure(notebook, execution.failure)
    about = {
        "format": FORMAT,
        "status": status,
        "notebook": source,
        "record": record,
        "sections": list(sections),
        "parameters": dict(parameters),
        "results": dict(results),
        "outputs": {name: dict(output) for name, output in (outputs or {}).items()},
        "library": dict(library or {}),
    }
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "trimtab": about})
    return signed(notebook)


def signed(notebook: NotebookNode) -> NotebookNode:
    """The record with the digest of its cells and of what it says of itself, as it will be read back."""
    text = nbformat.writes(plain(notebook), allow_nan=False)
    record = nbformat.v4.reads_json(text)
    record.metadata["trimtab"]["digest"] = _digest(record)
    return record


def is_altered(record: NotebookNode) -> bool:
    """Whether cells or metadata are other than when the record was made. Early records have nothing to tell by."""
    about = record.metadata["trimtab"]
    return about.get("format", 0) >= 2 and about["digest"] != _digest(record)


def provenance_of(record: NotebookNode) -> dict[str, str]:
    """The rows of a record's provenance cell."""
    for cell in record.cells:
        if PROVENANCE in cell.metadata.get("tags", []):
            return dict(re.findall(r"^\| ([a-z][a-z ]*) \| (.*) \|$", cell.source, flags=re.MULTILINE))
    return {}


def title_of(record: NotebookNode) -> str | None:
    """The first heading."""
    headings = (re.match(r"# +(.+)", cell.source) for cell in record.cells)
    return next((heading.group(1) for heading in headings if heading), None)


def write_record(notebook: NotebookNode, path: Path) -> None:
    """Write a record, atomically. Raises InputError where it could not be read back."""
    text = nbformat.writes(notebook, allow_nan=False) + "\n"
    parse_record(text, str(path))
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def results_of(found: Any) -> dict[str, Any]:
    """What a stage's results file holds, once it is known to be metrics and verdicts; InputError says what is not."""
    try:
        Results.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"`{'.'.join(map(str, first['loc'])) or 'all of it'}` {first['msg'].lower()}") from None
    if missing := [key for key in ("metrics", "claims") if key not in found]:
        raise InputError(f"it has no `{missing[0]}`")
    return dict(found)


def read_record(path: Path) -> NotebookNode:
    """Read a record back. Raises InputError where it is missing or is none; see `parse_record`."""
    try:
        return parse_record(path.read_bytes().decode("utf-8"), str(path))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InputError(f"{path} is missing: run `dvc repro`.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a record: it is no text in UTF-8.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None


def parse_record(content: str, name: str) -> NotebookNode:
    """A record from its text. Raises InputError, with the name, where that is no record, one that has been altered
    beyond reading, or a newer one. Of others `is_altered` tells whether they are as they were made."""
    try:
        held = json.loads(
            content, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_pairs
        )  # what a strict parser takes
        record = _as_notebook(held)
    except _BROKEN as error:
        reason = visible(" ".join(str(error).split()))[:200] or type(error).__name__
        raise InputError(f"{name} is not a notebook that nbformat can read, or has been altered: {reason}.") from None
    if "trimtab" not in record.metadata:
        raise InputError(f"{name} is a notebook, but no record: `trimtab run` makes them.")
    about = record.metadata["trimtab"]
    written = about.get("format", 0) if isinstance(about, dict) else 0
    if isinstance(written, int) and written > FORMAT:
        raise InputError(
            f"{name} was written by a newer Trimtab (records of format {written}, this one reads up to {FORMAT}): "
            "update this checkout."
        )
    try:
        (About if written in (0, 1) else Signed).model_validate(about)
    except ValidationError as error:
        first = error.errors()[0]
        where = visible(".".join(["trimtab", *map(str, first["loc"])]))[:200]
        raise InputError(
            f"{name} has been altered: `{where}` of its metadata is not what a run writes ({first['msg']})."
        ) from None
    return record


def _mark_failure(notebook: NotebookNode, reason: str) -> None:
    unreached = 0
    for index, cell in reversed(list(enumerate(notebook.cells))):
        status = cell.metadata.get("trimtab", {}).get("status")
        if status == "not run":
            unreached += 1
            notebook.cells.insert(index, _markdown("*The next cell was not run.*", f"not-run-{index}", BANNER))
        elif status == "failed":
            notebook.cells.insert(index, _markdown("**The run failed in the next cell.**", f"failed-{index}", BANNER))
    text = f"> **FAILED**: {reason}. Cells that never ran: {unreached}. This record is no result."
    notebook.cells.insert(0, _markdown(text, "failure", BANNER))


def _markdown(text: str, name: str, tag: str) -> NotebookNode:
    return new_markdown_cell(text, id=name, metadata={"tags": [tag]})


def _digest(record: NotebookNode) -> str:
    about = {key: value for key, value in record.metadata["trimtab"].items() if key != "digest"}
    return fingerprint([record.cells, about])


def _as_notebook(held: Any) -> NotebookNode:
    if not isinstance(held, dict) or held.get("nbformat") != 4 or type(held.get("nbformat_minor")) is not int:
        raise ValueError("it is no notebook of format 4")
    level, depth = [held], 0
    while level := [item for each in level for item in (each.values() if isinstance(each, dict) else each)]:
        level = [item for item in level if isinstance(item, dict | list)]
        depth += 1
        if depth > DEEPEST + 20:
            raise ValueError("it is nested too deeply")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nbformat.validate(held)
    return nbformat.v4.to_notebook_json(held)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it has a key twice")
    return found
