"""Notebooks run one after the other in one kernel, each from an empty namespace: what they import takes longer than
most of what they do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient

from trimtab.pipeline.parameters import declared_parameters

ROOT = Path(__file__).parents[1]
Run = Callable[[nbformat.NotebookNode], nbformat.NotebookNode]


@contextmanager
def kernel(folder: Path) -> Iterator[Run]:
    """What runs notebooks in this folder."""
    manager = AsyncKernelManager()
    run_sync(manager.start_kernel)(cwd=str(folder))

    def run(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
        emptied = nbformat.v4.new_code_cell("%reset -f")
        notebook.cells.insert(0, emptied)
        # The limit is for cells that hang: how long one takes is the machine's affair.
        NotebookClient(notebook, timeout=900, km=manager).execute()
        notebook.cells.remove(emptied)
        return notebook

    try:
        yield run
    finally:
        run_sync(manager.shutdown_kernel)(now=True)


def execute(path: Path, parameters: dict, *further: str, run: Run | None = None) -> nbformat.NotebookNode:
    """Run a notebook with parameters injected below their cell, as papermill does, and cells appended; by `run` of a
    `kernel`, or in a kernel of its own."""
    notebook = nbformat.read(path, as_version=4)
    declared = declared_parameters(notebook, path.name)
    assert set(parameters) <= set(declared)
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    injected = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(injected))
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in further]
    if run is not None:
        return run(notebook)
    with kernel(path.parent) as alone:
        return alone(notebook)
