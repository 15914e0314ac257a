"""A project of one stage, run by DVC: made on the spot, to be run, compared and harmed."""

import subprocess
from pathlib import Path

import nbformat
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tests.smoke import environment

RUN = "trimtab run notebooks/toy.ipynb --section toy --out out=data/toy --out results=data/results/toy.json"
STAGE = {
    "cmd": RUN,
    "params": ["toy"],
    "deps": ["notebooks/toy.ipynb"],
    "outs": ["data/toy", "records/toy.ipynb", "records/toy.log"],
    "metrics": [{"data/results/toy.json": {"cache": False}}],
}
IGNORED = "/data/toy\n/records/*.ipynb\n/records/*.log\n/scratch\n__pycache__\n"


def call(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, encoding="utf-8", check=False
    )


def succeed(folder: Path, *command: str) -> None:
    done = call(folder, *command)
    assert done.returncode == 0, done.stdout + done.stderr


def make(folder: Path, parameters: str, work: str) -> None:
    """A repository with notebook, stage and git's and DVC's folders; params.yaml is the caller's."""
    cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]}), new_code_cell(work)]
    (folder / "notebooks").mkdir(parents=True)
    nbformat.write(new_notebook(cells=[new_markdown_cell("# A toy"), *cells]), folder / "notebooks/toy.ipynb")
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"toy": STAGE}}), encoding="utf-8")
    (folder / ".gitignore").write_text(IGNORED, encoding="utf-8")
    succeed(folder, "git", "init", "--quiet")
    succeed(folder, "dvc", "init", "--quiet")
