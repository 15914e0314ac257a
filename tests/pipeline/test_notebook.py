"""What notebooks call behaves the same from any folder of the project."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from trimtab.claims import Claim
from trimtab.errors import InputError
from trimtab.pipeline import notebook
from trimtab.pipeline.root import project_root

BASE = {"seed": 3, "device": "cpu", "threads": 2}


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int
    sites: tuple[int, ...]


@pytest.fixture
def stage(project, monkeypatch):
    (project / "notebooks").mkdir()
    monkeypatch.chdir(project / "notebooks")
    return notebook.begin({**BASE, "steps": 3, "sites": [1, 2]})


def test_begin_goes_to_the_root_and_fixes_the_seed(stage, project):
    assert project_root() == project
    first = torch.rand(3)
    notebook.begin(BASE)
    assert torch.equal(torch.rand(3), first)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("device", "message"), [("tpu", "must be cpu, cuda or auto"), ("cuda", "sees no GPU")])
def test_devices_are_checked(device, message):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(InputError, match=message):
        notebook.begin(BASE | {"device": device})


def test_configurations_are_built_from_the_parameters_cell(stage):
    assert stage.configure(Config) == Config(3, (1, 2))
    with pytest.raises(InputError, match="lacks `steps`, a field of Config"):
        dataclasses.replace(stage, namespace={}).configure(Config)


def test_resume_folders_are_found_again_for_the_same_work_only(stage):
    first = stage.resume_folder({"a": 1})
    assert stage.resume_folder({"a": 2}) != first
    assert stage.resume_folder({"a": 1}) == first


def test_two_runs_of_the_same_work_do_not_share_a_resume_folder(stage, project):
    code = (
        "import time; from trimtab.pipeline import notebook\n"
        f"stage = notebook.begin({BASE!r})\nstage.resume_folder('work'); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], cwd=project, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(InputError, match="in use by another run of the same work"):
        stage.resume_folder("work")
    other.kill()
    other.wait()
    assert stage.resume_folder("work").is_dir()


def test_finish_writes_results_and_drops_scratch(stage, project):
    verdict = Claim("c", "text", "statistic", "above", 0.0, "chance").judge(0.123456789, 0.1, 0.2, "3 seeds")
    work = stage.resume_folder("x")
    stage.finish("data/results/toy.json", {"fvu": {"k=1": 0.123456789}, "n": 3}, [verdict], discard=[work])
    written = json.loads((project / "data/results/toy.json").read_text())
    assert written["metrics"] == {"fvu": {"k=1": 0.123457}, "n": 3}
    assert written["claims"][0]["outcome"] == "held"
    assert not work.exists()


def test_outside_a_project_it_says_so(tmp_path):
    with pytest.raises(InputError, match="not inside a Trimtab checkout"):
        project_root(tmp_path)
