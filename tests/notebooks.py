"""A notebook run as papermill runs it, with parameters of one's own, and with cells appended."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

from trimtab.pipeline.parameters import declared_parameters

ROOT = Path(__file__).parents[1]


def execute(path: Path, parameters: dict, *further: str) -> nbformat.NotebookNode:
    """Run a notebook with parameters injected below their cell, as papermill does, and cells appended."""
    notebook = nbformat.read(path, as_version=4)
    declared = declared_parameters(notebook, path.name)
    assert set(parameters) <= set(declared)
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    injected = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(injected))
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in further]
    return NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(path.parent)}}).execute()
