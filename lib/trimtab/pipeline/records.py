"""Executed notebooks as records: what differs between two equal runs is confined to one provenance cell."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

from trimtab.errors import InputError
from trimtab.files import atomic
from trimtab.pipeline.execution import Execution, was_executed

FORMAT = 1
"""Of the metadata that a record has about itself."""
PROVENANCE, BANNER = "provenance", "failure"
_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}\b")
_CELL_FILE = re.compile(r"/\S*?ipykernel_\d+/\d+\.py")


def make_record(
    execution: Execution,
    provenance: str,
    *,
    root: Path,
    source: str,
    parameters: Mapping[str, Any],
    results: Mapping[str, Any],
) -> NotebookNode:
    """Normalise an executed notebook and add provenance; a failed one says so at its top, and which cells never ran.

    Time stamps, durations, random cell ids, papermill's metadata and the paths of this machine are removed. What the
    run was given and what it found is in the metadata too, so that a record can be compared wherever it lies.
    """
    notebook = execution.notebook
    status = "failed" if execution.failure else "complete"
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
        cell.outputs = [_clean(output, root) for output in _merge_streams(cell.outputs)]
    injected = [i for i, cell in enumerate(notebook.cells) if "injected-parameters" in cell.metadata.get("tags", [])]
    place = injected[0] + 1 if injected else 1
    notebook.cells.insert(place, _markdown(provenance, "provenance", PROVENANCE))
    if execution.failure:
        _mark_failure(notebook, execution.failure)
    # The kernel's own description carries version numbers; those belong to the provenance cell.
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    about = {
        "format": FORMAT,
        "status": status,
        "notebook": source,
        "parameters": dict(parameters),
        "results": dict(results),
    }
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "trimtab": about})
    return notebook


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
    """Validate and write a record, atomically."""
    nbformat.validate(notebook)
    with atomic(path) as partial:
        partial.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def read_record(path: Path) -> NotebookNode:
    """Read a record back. Raises InputError where it is missing or is none; see `parse_record`."""
    try:
        return parse_record(path.read_text(encoding="utf-8"), str(path))
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path} is missing: run `dvc repro`.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a record: it is no text.") from None


def parse_record(content: str, name: str) -> NotebookNode:
    """A record from its text. Raises InputError, with the name, where that is no record or a newer one."""
    try:
        record = nbformat.reads(content, as_version=4)
        about = record.metadata.get("trimtab")
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, AttributeError, KeyError, TypeError):
        raise InputError(f"{name} is not a notebook that nbformat can read.") from None
    if about is None:
        raise InputError(f"{name} is a notebook, but no record: `trimtab run` makes them.")
    written = about.get("format", 0)
    if written > FORMAT:
        raise InputError(
            f"{name} was written by a newer Trimtab (records of format {written}, this one reads up to {FORMAT}): "
            "update this checkout."
        )
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


def _merge_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """How stdout and stderr are cut and interleaved is a matter of timing: between other outputs, join each in turn."""
    merged: list[NotebookNode] = []
    group: dict[str, NotebookNode] = {}
    for output in outputs:
        if output.output_type != "stream":
            merged += [group[name] for name in sorted(group, reverse=True)]
            group = {}
            merged.append(output)
        elif output.name in group:
            group[output.name].text += output.text
        else:
            group[output.name] = output
    return merged + [group[name] for name in sorted(group, reverse=True)]


def _clean(output: NotebookNode, root: Path) -> NotebookNode:
    def walk(value: Any, key: str = "") -> Any:
        if isinstance(value, str):
            return value if key.startswith("image/") else _text(value, root)
        if isinstance(value, list):
            return [walk(item, key) for item in value]
        if isinstance(value, dict):
            return type(value)({k: walk(v, k) for k, v in value.items()})
        return value

    output.pop("transient", None)
    return walk(output)


def _text(text: str, root: Path) -> str:
    text = _CELL_FILE.sub("<cell>", text)
    # Longest first: the environment usually lies inside the root, and the root inside the home.
    places = {sys.prefix: "<env>", sys.base_prefix: "<python>", str(root): ".", str(Path.home()): "~"}
    for place in sorted(places, key=len, reverse=True):
        if len(place) > 1:
            text = text.replace(place, places[place])
    return _ADDRESS.sub("0x…", text)
