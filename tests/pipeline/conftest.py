"""A toy project with notebooks made on the spot, run by the real runner in real kernels."""

import shutil
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from trimtab.pipeline.records import read_record
from trimtab.pipeline.run import run_notebook

from .recorded import make_two_commits

PARAMETERS = 'lr: float = 0.1\nsteps: int = 3\nname: str = "x"\nout: str = "out.txt"'


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    (tmp_path / "params.yaml").write_text(
        yaml.safe_dump({"toy": {"lr": 0.5, "steps": 7}, "other": {"secret": 1}}), encoding="utf-8"
    )
    return tmp_path


def make_notebook(project: Path, *cells: str, parameters: str = PARAMETERS) -> Path:
    content = new_notebook(
        cells=[
            new_markdown_cell("# A toy"),
            new_code_cell(parameters, metadata={"tags": ["parameters"]}),
            *(new_code_cell(cell) for cell in cells),
        ]
    )
    nbformat.write(content, project / "toy.ipynb")
    return Path("toy.ipynb")


@pytest.fixture
def run(project: Path) -> Callable[..., tuple[int, nbformat.NotebookNode]]:
    """Write a notebook of the given cells, run it with section `toy`, and return (exit code, record)."""

    def run(*cells: str, cell_timeout: int | None = None, settings=None, name: str = "toy", sections=("toy",)):
        code = run_notebook(
            make_notebook(project, *cells),
            Path(f"records/{name}.ipynb"),
            root=project,
            sections=sections,
            settings=settings or {},
            outputs={"out": Path("out.txt")},
            cell_timeout=cell_timeout,
        )
        return code, read_record(project / f"records/{name}.ipynb")

    return run


@pytest.fixture(scope="session")
def two_commits(tmp_path_factory) -> Path:
    """A repository with two commits, each with its run."""
    folder = tmp_path_factory.mktemp("toy") / "toy"
    make_two_commits(folder)
    return folder


@pytest.fixture
def copied(two_commits, tmp_path, monkeypatch) -> Path:
    """A copy to do harm to, in which one works."""
    folder = tmp_path / "copy"
    shutil.copytree(two_commits, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder
