"""Interactive notebooks run from top to bottom without a front end, on tiny artefacts, and react to what is chosen."""

import subprocess
from functools import partial
from pathlib import Path

import polars as pl
import pytest
import torch
from nbclient.exceptions import CellExecutionError

from tests import notebooks
from tests.notebooks import ROOT
from trimtab.activations import ActivationCache
from trimtab.checkpoint import save_tensors
from trimtab.pipeline.conditions import conditions
from trimtab.rebased.model import LanguageModel, ModelConfig
from trimtab.rebased.text import Text, train_tokenizer
from trimtab.repetition.arms import VECTORS
from trimtab.sae import SAE
from trimtab.steering.export import save_vectors
from trimtab.steering.vectors import SteeringVectors

START = ROOT / "notebooks/explore/start.ipynb"
FEATURES = ROOT / "notebooks/explore/sae_features.ipynb"
LENS = ROOT / "notebooks/explore/lens.ipynb"
REPETITION = ROOT / "notebooks/explore/repetition.ipynb"
RECALL = ROOT / "notebooks/explore/recall.ipynb"
KERNELS = ROOT / "notebooks/explore/kernels.ipynb"
SITE = 1


@pytest.fixture(scope="module")
def execute():
    """`notebooks.execute`, in one kernel."""
    with notebooks.kernel(ROOT / "notebooks/explore") as run:
        yield partial(notebooks.execute, run=run)


@pytest.fixture(scope="module")
def parameters(caches, model_folder, tmp_path_factory):
    """What the notebook reads, made tiny: model, caches and an untrained SAE."""
    saes = tmp_path_factory.mktemp("saes")
    train = ActivationCache(caches / "train", SITE)
    sae = SAE(train.d_model, 40, 6, generator=torch.Generator().manual_seed(1))
    sae.fold(train.mean, train.statistics.scale).save_pretrained(saes / "hierarchical-6/seed-0", {"site": SITE})
    folders = {"model": str(model_folder), "activations": str(caches), "saes": str(saes)}
    return {**folders, "arm": "hierarchical-6", "device": "cpu", "threads": 1, "text": "a <b>wörd</b>"}


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


def test_pages_and_tables_are_there_without_a_front_end_and_follow_what_is_chosen(execute, parameters):
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


def test_what_is_missing_is_named_with_the_command_that_makes_it(execute, parameters, tmp_path):
    with pytest.raises(CellExecutionError) as failed:
        execute(FEATURES, parameters | {"saes": str(tmp_path)})
    assert failed.value.ename == "InputError"
    assert failed.value.evalue.endswith("holds no SAE: run `dvc repro sae@hierarchical-6`.")


def test_in_a_fresh_clone_the_start_says_what_is_missing(tmp_path):
    """Which has dvc.lock and committed results, but neither records nor DVC's cache."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    states = {each.state for each in conditions(clone)}
    assert states <= {"missing", "stale", "never run"}  # stale: a commit's sources are newer than its dvc.lock
    assert states & {"missing", "stale"}
    with notebooks.kernel(clone / "notebooks/explore") as run:
        notebook = notebooks.execute(START, {}, "print(said.outputs)", run=run)
    shown = str([cell.get("outputs") for cell in notebook.cells])
    assert "No record is here yet: run `dvc repro`." in shown
    assert "dvc repro sae_compare" in shown
    assert any(f"{state}</b>" in shown for state in states - {"never run"})


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


def test_the_lens_follows_prompt_layers_and_strength(execute, lens_parameters):
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


def test_without_vectors_the_lens_is_clean_and_says_what_makes_them(execute, lens_parameters, tmp_path):
    notebook = execute(LENS, lens_parameters | {"steering": str(tmp_path)}, CLEAN_ALONE)
    said = notebook.cells[-1].outputs[0].text
    assert said.strip().endswith("holds no vectors: run `dvc repro steering@steering`.")


DRAWN = """
def drawn(output):
    (shown,) = output.outputs
    return shown["data"]["application/vnd.plotly.v1+json"]["data"]
"""


@pytest.fixture(scope="module")
def repetition_parameters(model_folder, tmp_path_factory):
    """The tiny model and a vector for each of its blocks."""
    folder = tmp_path_factory.mktemp("repetition")
    (folder / "implicit-steering/seed-0").mkdir(parents=True)
    vectors = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    save_tensors(folder / "implicit-steering/seed-0/trained.safetensors", {VECTORS: vectors})
    given = {"model": str(model_folder), "trained": str(folder), "device": "cpu", "threads": 1, "dtype": "float32"}
    return given | {"text": "a <b>", "new_tokens": 12, "repeats": 3}


REPETITION_CHOICES = """
model, steered = drawn(chart)
assert (model["name"], steered["name"]) == ("model", "steered") and len(model["y"]) == 9
assert drawn(curve)[0]["x"] == [1, 2, 3] and drawn(curve)[0]["y"] != drawn(curve)[1]["y"]
assert "a &lt;b&gt;" in written.value and "<b>" not in written.value
scale.value = 0.0
for output in (chart, curve):
    model, steered = drawn(output)
    assert model["y"] == steered["y"]
before = written.value
named.value, length.value = "top-k-8", 8
assert len(drawn(chart)[0]["y"]) == 5 and written.value != before
named.value = "best"
assert "is not a decoder" in written.value and not chart.outputs
named.value, typed.value, again.value = "greedy", "", ""
assert "The text has 0 tokens" in written.value and "tokens" in complaint.value and not curve.outputs
"""


def test_repetition_follows_decoder_strength_and_text(execute, repetition_parameters):
    execute(REPETITION, repetition_parameters, DRAWN, REPETITION_CHOICES)


ALONE = """
assert [line["name"] for line in drawn(chart)] == ["model"] and scale.disabled
print(where)
"""


def test_without_vectors_repetition_is_the_models_own(execute, repetition_parameters, tmp_path):
    notebook = execute(REPETITION, repetition_parameters | {"trained": str(tmp_path)}, DRAWN, ALONE)
    said = notebook.cells[-1].outputs[0].text
    assert said.strip().endswith("holds no vectors: run `dvc repro repetition@implicit-steering`.")


@pytest.fixture(scope="module")
def recaller(tmp_path_factory) -> Path:
    """A model of two heads, untrained, with a learnt map that is not the one it starts with."""
    folder = tmp_path_factory.mktemp("mqar") / "model"
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(300, d_model=16, mixers=("conv", "rebased"), heads=2, d_k=4))
    for name in ("gamma_q", "beta_k"):
        torch.nn.init.normal_(getattr(model.blocks[1].mixer, name))
    for module in (model.embedding, model.blocks[1].mixer.out):  # so that attention is heard in the logits
        torch.nn.init.normal_(module.weight)
    model.save(folder)
    return folder


RECALL_CHOICES = """
weights, rings = drawn(chart)
assert len(weights["z"]) == 4 and len(weights["z"][0]) == 8 and len(rings["x"]) == 4
largest, ids = weights["z"], row().inputs[0].tolist()
for label, place in zip(rings["y"], rings["x"], strict=True):
    key, value = int(label.split()[-1]), int(place.split()[1])
    assert ids[ids.index(key) + 1] == value, "the ring is not on the value of the key"
head.value = 1
assert all(a <= b for one, all_ in zip(drawn(chart)[0]["z"], largest) for a, b in zip(one, all_))
view.value = "before training"
assert drawn(chart)[0]["z"] != largest
assert " of 4 right" in answers.value
told.value = 20
assert "20 pairs need rows of at least 80 tokens" in answers.value and not chart.outputs
tokens.value = 100
assert len(drawn(chart)[0]["z"]) == 20
"""


def test_recall_shows_where_queries_look_and_where_their_answers_stand(execute, recaller, tmp_path):
    given = {"model": str(recaller), "threads": 1, "pairs": 4, "time": 16}
    execute(RECALL, given, DRAWN, RECALL_CHOICES)
    with pytest.raises(CellExecutionError) as failed:
        execute(RECALL, given | {"model": str(tmp_path / "none")})
    assert failed.value.evalue.endswith("is not here: run `dvc repro mqar`.")


KERNEL_CHOICES = """
def lines():
    return {line["name"]: line["y"] for line in drawn(chart)}

assert "of answers are right" in measured.value
trained = lines()
assert trained["learnt"] != trained["as it starts"]
assert abs(min(trained["Based"]) - 0.1) < 1e-3, "1 + s + s^2 / 2 is 0.5 at s = -1, 5 at s = 2 = sqrt(d_k)"
scale.value = 0.0
assert lines()["learnt"] == lines()["as it starts"] == trained["as it starts"]
assert set(lines()["gamma_q"]) == {1.0} and set(lines()["beta_k"]) == {0.0}
scale.value = 1.0
assert lines() == trained
which.value = which.options[1]
assert "nats a token (2 blocks)" in measured.value, measured.value
as_trained_nats = measured.value
scale.value = 0.0
assert measured.value != as_trained_nats
held_out = None
show()
assert "run `dvc repro pretrain_text`" in measured.value
"""


def test_kernels_go_back_to_their_start_and_cost_what_they_cost(execute, recaller, documents, tmp_path):
    tokenizer = train_tokenizer(documents["text"].to_list(), 300)
    split = documents.with_columns(split=pl.lit("test"))
    every = pl.concat([split, *(split.head(1).with_columns(split=pl.lit(each)) for each in ("train", "val"))])
    Text.of(every, tokenizer).save(tmp_path / "text", tokenizer)
    LanguageModel.load(recaller).save(tmp_path / "models/rebased/seed-0")
    given = {"recall_model": str(recaller), "text_models": str(tmp_path / "models"), "text": str(tmp_path / "text")}
    execute(KERNELS, given | {"threads": 1, "blocks": 2}, DRAWN, KERNEL_CHOICES)
    none = str(tmp_path / "none")
    with pytest.raises(CellExecutionError) as failed:
        execute(KERNELS, {"recall_model": none, "text_models": none})
    assert failed.value.evalue.endswith("run `dvc repro mqar pretrain@rebased`.")
