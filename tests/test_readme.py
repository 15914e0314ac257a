"""The README's code on steering, repetition and linear attention runs as it stands, mostly on a tiny model."""

import re
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from trimtab.pretrained import load_model, load_tokenizer

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
(STEERING,) = (block for block in BLOCKS if "SteeringVectors" in block)
(REPETITION,) = (block for block in BLOCKS if "seq_rep" in block)
(LINEAR,) = (block for block in BLOCKS if "PolynomialAttention" in block)


def test_the_steering_example_trains_keeps_and_exports(model_folder, tmp_path, monkeypatch):
    shutil.copytree(model_folder, tmp_path / "smollm2")
    monkeypatch.chdir(tmp_path)
    names = {"model": load_model("smollm2"), "tokenizer": load_tokenizer("smollm2")}
    exec(STEERING, names)
    assert len(names["history"]) == 2
    assert (tmp_path / "vectors.gguf").stat().st_size > 0
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    assert folded.config.mlp_bias


def test_the_repetition_example_trains_and_measures(model_folder, tmp_path, monkeypatch):
    shutil.copytree(model_folder, tmp_path / "smollm2")
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "tokenizer": load_tokenizer("smollm2")}
    exec(REPETITION, names)
    assert len(names["trained"].history) == 4
    assert names["written"].shape == (2, 24)
    assert any(vector.any() for vector in names["policy"].trained.values())


def test_the_example_of_linear_attention_runs():
    names = {}
    exec(LINEAR, names)
    assert names["y"].shape == (2, 1000, 256)
    assert names["more"].shape == names["out"].shape == (1, 1000, 4, 64)
    assert len(names["new"]) == 20
