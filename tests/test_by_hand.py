"""Every source notebook as a user of JupyterLab runs it: in its own folder, with its own quick defaults; and what the
README says of reading a model and of SAEs, with what the pipeline left."""

import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import nbformat
import pytest

from tests.notebooks import Run, kernel
from tests.smoke import ROOT, contents, made
from trimtab.sae import SAE

pytestmark = pytest.mark.after_pipeline
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory, pytestconfig) -> dict[str, Future]:
    """The executed notebooks, by name. Two at a time, for the other tests are mostly done by now."""
    project = made(tmp_path_factory, pytestconfig)[1]
    idle: SimpleQueue[Run] = SimpleQueue()

    def run(path: Path) -> nbformat.NotebookNode:
        kernel_run = idle.get()
        try:
            return kernel_run(nbformat.read(path, as_version=4))
        finally:
            idle.put(kernel_run)

    before = contents(project)
    with kernel(project / "notebooks") as one, kernel(project / "notebooks") as other, ThreadPoolExecutor(2) as pool:
        idle.put(one)
        idle.put(other)
        runs = {path.stem: pool.submit(run, path) for path in NOTEBOOKS}
    changed = {path for path, _ in contents(project).items() ^ before.items()}
    assert not changed, "a notebook run by hand left its trace in the pipeline's data"
    return runs


@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])
def test_source_notebooks_run_by_hand_from_their_own_defaults(by_hand, name):
    code = [cell for cell in by_hand[name].result().cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "a cell was not run"


def test_the_readmes_examples_of_reading_and_of_saes_run(tmp_path_factory, pytestconfig, monkeypatch):
    monkeypatch.chdir(made(tmp_path_factory, pytestconfig)[1])
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    for block in (block for block in blocks if "capture(" in block or "SAE.from_pretrained" in block):
        exec(block, names)
    assert isinstance(names["sae"], SAE)
    assert names["residual"].shape[-1] == names["x_hat"].shape[-1] == 576
    assert (names["latents"].values > 0).any()
