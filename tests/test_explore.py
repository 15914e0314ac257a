"""Interactive notebooks run from top to bottom without a front end, on tiny artefacts, and react to what is chosen."""

from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from trimtab.activations import ActivationCache
from trimtab.pipeline.parameters import declared_parameters
from trimtab.sae import SAE

ROOT = Path(__file__).parents[1]
FEATURES = ROOT / "notebooks/explore/sae_features.ipynb"
SITE = 1


@pytest.fixture(scope="module")
def parameters(caches, model_folder, tmp_path_factory):
    """What the notebook reads, made tiny: model, caches and an untrained SAE."""
    saes = tmp_path_factory.mktemp("saes")
    train = ActivationCache(caches / "train", SITE)
    sae = SAE(train.d_model, 40, 6, generator=torch.Generator().manual_seed(1))
    sae.fold(train.mean, train.statistics.scale).save_pretrained(saes / "hierarchical-6/seed-0", {"site": SITE})
    folders = {"model": str(model_folder), "activations": str(caches), "saes": str(saes)}
    return {**folders, "arm": "hierarchical-6", "device": "cpu", "threads": 1, "text": "a <b>wörd</b>"}


def execute(parameters: dict, *further: str) -> nbformat.NotebookNode:
    """Run the notebook with parameters injected below their cell, as papermill does, and cells appended."""
    notebook = nbformat.read(FEATURES, as_version=4)
    declared = declared_parameters(notebook, FEATURES.name)
    assert set(parameters) <= set(declared)
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    injected = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(injected))
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in further]
    return NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(FEATURES.parent)}}).execute()


CHOICES = """
picker.value = 5
assert "Latent 5<" in page.value
denser.click()
assert f"Latent {picker.value}<" in page.value and picker.value != 5
typed.value = "zz"
assert found.value.count("<tr>") == 3, found.value
choice.index = 2
assert f"latent {picker.value} " in choice.label and f"Latent {picker.value}<" in page.value
before = page.value
typed.value = ""
assert "The text has 0 tokens" in found.value and page.value == before
"""


def test_pages_and_tables_are_there_without_a_front_end_and_follow_what_is_chosen(parameters):
    kept = "from IPython.display import HTML\ndisplay(HTML(page.value), HTML(found.value))"
    notebook = execute(parameters | {"latent": 3}, kept, CHOICES)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    views = [o.data["text/plain"] for o in outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]
    assert sum(view.startswith("VBox") for view in views) == 2
    page, table = (output.data["text/html"] for output in notebook.cells[-2].outputs)
    assert "Latent 3<" in page
    assert "hierarchical-6" in page
    assert "<table>" in table
    assert "&lt;" in table
    assert "<b>" not in table


def test_what_is_missing_is_named_with_the_command_that_makes_it(parameters, tmp_path):
    with pytest.raises(CellExecutionError) as failed:
        execute(parameters | {"saes": str(tmp_path)})
    assert failed.value.ename == "InputError"
    assert failed.value.evalue.endswith("holds no SAE: run `dvc repro sae@hierarchical-6`.")
