"""The README's code on steering runs as it stands, on a tiny model."""

import re
import shutil
from pathlib import Path

from transformers import AutoModelForCausalLM

from trimtab.pretrained import load_model, load_tokenizer

README = (Path(__file__).parents[1] / "README.md").read_text()
(STEERING,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "SteeringVectors" in block)


def test_the_steering_example_trains_keeps_and_exports(model_folder, tmp_path, monkeypatch):
    shutil.copytree(model_folder, tmp_path / "smollm2")
    monkeypatch.chdir(tmp_path)
    names = {"model": load_model("smollm2"), "tokenizer": load_tokenizer("smollm2")}
    exec(STEERING, names)
    assert len(names["history"]) == 2
    assert (tmp_path / "vectors.gguf").stat().st_size > 0
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    assert folded.config.mlp_bias
