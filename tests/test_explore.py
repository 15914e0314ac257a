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
from trimtab.steering.export import save_vectors
from trimtab.steering.vectors import SteeringVectors

ROOT = Path(__file__).parents[1]
FEATURES = ROOT / "notebooks/explore/sae_features.ipynb"
LENS = ROOT / "notebooks/explore/lens.ipynb"
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
    notebook = execute(FEATURES, parameters | {"latent": 3}, kept, CHOICES)
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
        execute(FEATURES, parameters | {"saes": str(tmp_path)})
    assert failed.value.ename == "InputError"
    assert failed.value.evalue.endswith("holds no SAE: run `dvc repro sae@hierarchical-6`.")


@pytest.fixture(scope="module")
def lens_parameters(model_folder, tmp_path_factory):
    """The tiny model and vectors for two of its blocks."""
    folder = tmp_path_factory.mktemp("steering")
    vectors = SteeringVectors([0, 2], 16)
    with torch.no_grad():
        vectors.weight.normal_(generator=torch.Generator().manual_seed(0))
    (folder / "steering/seed-3").mkdir(parents=True)
    save_vectors(folder / "steering/seed-3/vectors.safetensors", vectors, model_folder)
    given = {"model": str(model_folder), "steering": str(folder), "device": "cpu", "threads": 1}
    return given | {"text": "a $x$ <b>", "instruction": "", "new_tokens": 3, "positions": 4}


LENS_CHOICES = """
def heat():
    (output,) = chart.outputs
    return output["data"]["application/vnd.plotly.v1+json"]["data"]

clean, steered, difference = heat()
assert len(clean["z"]) == 3 and len(clean["z"][0]) == 4
assert clean["z"] != steered["z"] and max(map(max, difference["z"])) > 0
assert "<b>clean</b>" in answers.value and "<b>steered</b>" in answers.value
scale.value = 0.0
clean, steered, difference = heat()
assert clean["z"] == steered["z"] and not any(map(any, difference["z"]))
scale.value, layers.value = -2.0, (2,)
clean, steered, difference = heat()
assert clean["z"][:2] == steered["z"][:2] and clean["z"][2] != steered["z"][2]
colour.value, last.value, change.value = "target", 2, "target"
assert heat()[0]["z"][0][1] is None, "the last token has no next one"
after.value, typed.value = "neither", "a <i>"
assert heat()[0]["hovertext"][2][1].startswith("after block 2, position 4")
layers.value = ()
assert len(heat()) == 1 and "steered" not in answers.value
typed.value = ""
assert not chart.outputs and "The prompt has 0 tokens" in answers.value
told.value = "Say <b>"
assert len(heat()) == 1
"""


def test_the_lens_follows_prompt_layers_and_strength(lens_parameters):
    notebook = execute(LENS, lens_parameters, LENS_CHOICES)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    views = [o.data["text/plain"] for o in outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]
    assert len(views) == 1
    assert views[0].startswith("VBox")


CLEAN_ALONE = """
assert len(chart.outputs) == 1 and len(chart.outputs[0]["data"]["application/vnd.plotly.v1+json"]["data"]) == 1
assert scale.disabled and "<b>clean</b>" in answers.value and "<b>steered</b>" not in answers.value
print(where)
"""


def test_without_vectors_the_lens_is_clean_and_says_what_makes_them(lens_parameters, tmp_path):
    notebook = execute(LENS, lens_parameters | {"steering": str(tmp_path)}, CLEAN_ALONE)
    said = notebook.cells[-1].outputs[0].text
    assert said.strip().endswith("holds no vectors: run `dvc repro steering@steering`.")
