"""The README's code on steering, repetition and linear attention runs as it stands, mostly on a tiny model; each of its
commands is run somewhere."""

import re
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from trimtab.pipeline.scales import compose
from trimtab.pretrained import load_model, load_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(\S.*?)(?:  +#.*)?$", "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)), re.MULTILINE)
RUN_BY = {
    "make test": "the program that runs this",
    "make repro": "tests/smoke.py",
    "make check": "tests/test_hygiene.py, which asks what it holds",
    "trimtab check": "tests/pipeline/test_check.py",
    "trimtab why": "tests/pipeline/test_kernel.py",
    "dvc": "tests/test_pipeline.py",
    "trimtab compose": "tests/test_pipeline.py",
    "trimtab records": "tests/pipeline/test_records_cli.py",
    "trimtab new": "tests/pipeline/test_new.py",
    "pytest tests/test_word_use.py": "tests/pipeline/test_new.py",
    "make lab": "tests/test_lab.py",
    "make site": "tests/smoke.py",
    "make serve": "tests/pipeline/site",
    ". .venv/bin/activate": "every user of a virtual environment",
}
"""Where the commands of the README are run, by how they begin: what they make themselves of what make calls."""
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


def test_every_command_is_run_by_a_test():
    assert len(COMMANDS) > 15
    left = [command for command in COMMANDS if not command.startswith(tuple(RUN_BY))]
    assert not left, "name the test that runs it"
    assert not [key for key in RUN_BY if not any(command.startswith(key) for command in COMMANDS)]


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z]+)", README))))
def test_make_has_what_the_readme_asks_of_it(target):
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr


def test_its_links_lead_somewhere():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md", ROOT / "data/README.md"]:
        links = [
            link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")) if "://" not in link
        ]
        assert not [link for link in links if not (page.parent / link).exists()], page


@pytest.mark.parametrize("page", ["README.md", "docs/scaling.md", "docs/models.md"])
def test_what_is_changed_by_the_experiments_it_shows_exists(page, tmp_path):
    """Whatever `dvc exp run -S` is told in a page composes, and the stages that it names are there."""
    shown = re.findall(r"^dvc exp run ((?:.*\\\n)*.*)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert shown
    stages = set(yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"])
    for experiment in shown:
        words = shlex.split(experiment.replace("\\\n", ""), comments=True)
        changes = [word for before, word in pairwise(words) if before == "-S"]
        scale = next((word.removeprefix("scale=") for word in changes if word.startswith("scale=")), "laptop")
        compose(ROOT, tmp_path / "params.yaml", scale, [word for word in changes if not word.startswith("scale=")])
        assert set(words) - {"-S", *changes} <= stages, experiment
