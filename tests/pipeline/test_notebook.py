"""What notebooks call behaves the same from any folder of the project."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trimtab import code, plots
from trimtab.claims import Claim
from trimtab.errors import InputError
from trimtab.pipeline import notebook
from trimtab.pipeline.root import project_root
from trimtab.rl import training
from trimtab.steering import figures

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


@pytest.mark.parametrize(("device", "message"), [("tpu", "`device` must be one of"), ("cuda", "sees no GPU")])
def test_devices_are_checked(device, message):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(InputError, match=message):
        notebook.begin(BASE | {"device": device})


def test_configurations_are_built_from_the_parameters_cell(stage):
    assert stage.configure(Config) == Config(3, (1, 2))
    with pytest.raises(InputError, match="lacks `steps`, a field of Config"):
        dataclasses.replace(stage, namespace={}).configure(Config)


def test_resume_folders_are_found_again_for_the_same_work_only(stage, capfd):
    first = stage.resume_folder({"a": 1})
    (first / "progress").touch()
    assert "of another run" not in capfd.readouterr().err
    other = stage.resume_folder({"a": 2})
    assert other != first
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "of another run" in line]
    assert f"{first} is of another run (a 1 there, 2 here)" in line
    assert stage.resume_folder({"a": 1}) == first
    assert (first / "progress").is_file()
    assert set(stage.folders) == {first, other}


@pytest.mark.parametrize(
    ("results", "slug"),
    [
        ("data/results/sae/topk-8.json", "sae-topk-8"),
        ("scratch/results/mqar.json", "mqar"),
        ("data/results/a b/ü*.json", "a_b-ü_"),
        ("", "stage"),
    ],
)
def test_a_resume_folder_bears_the_stages_name(project, monkeypatch, results, slug):
    monkeypatch.chdir(project)
    folder = notebook.begin({**BASE, "results": results}).resume_folder("x")
    assert folder.parent == Path("scratch/resume")
    assert re.fullmatch(rf"{re.escape(slug)}-[0-9a-f]{{16}}", folder.name)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"threads": 2}, {"data": 1.0}, {"text": "two"}, {"keyword": 2}],
    ids=lambda change: next(iter(change)),
)
def test_whatever_decides_the_results_decides_the_folder(project, monkeypatch, change):
    monkeypatch.chdir(project)

    def folder(seed=0, threads=1, data=0.0, text="one", keyword=1):
        Path("text").write_text(text, encoding="utf-8")
        stage = notebook.begin({**BASE, "seed": seed, "threads": threads})
        return stage.resume_folder({"data": torch.full((2,), data)}, text=Path("text"), keyword=keyword)

    first = folder()
    assert folder(**change) != first
    assert folder() == first


WORK = '''"""Work of a module of the user's own."""
from trimtab.epochs import mix


def work():
    return mix(1, 2)
'''


def test_a_comment_in_what_is_imported_discards_nothing_and_a_change_does(project):
    """Each run is a process of its own, as a kernel is."""
    code = (
        "import sys; sys.path.insert(0, '.')\nfrom work import work\nfrom trimtab.pipeline import notebook\n"
        f"print(notebook.begin({{**{BASE!r}, 'work': work}}).resume_folder('x'))"
    )

    def folder():
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=project, capture_output=True, encoding="utf-8", check=True
        )
        return done.stdout, done.stderr

    (project / "work.py").write_text(WORK, encoding="utf-8")
    first, _ = folder()
    described = WORK.replace('"""Work of a', '"""What a').replace("import mix\n", "import mix\n# new\n")
    described = described.replace("def work():\n", 'def work():\n    """It works."""\n')
    for text, same in ((described, True), (WORK.replace("mix(1, 2)", "mix(1, 3)"), False)):
        assert text != WORK
        (project / "work.py").write_text(text, encoding="utf-8")
        found, told = folder()
        assert (found == first) == same
        assert ("code of work.py" in told) != same


def test_code_that_shows_results_is_none_that_computes_them():
    """Any change in figures and in the site costs no progress; one in what trains would."""
    names = set(code.behind({"a": figures, "b": plots, "c": training.train, "d": notebook}, code.LIBRARY))
    needed = ("rl/training", "rl/gradient", "checkpoint", "pipeline/notebook")
    assert {f"lib/trimtab/{name}.py" for name in needed} < names
    assert not [name for name in names if re.search("figures|plots|site|records", name)]


def test_the_runner_learns_where_progress_is(stage, tmp_path, monkeypatch):
    told = tmp_path / "progress"
    monkeypatch.setenv("TRIMTAB_PROGRESS", str(told))
    folders = [stage.resume_folder(name) for name in ("one", "other")]
    assert told.read_text(encoding="utf-8").splitlines() == [str(folder.resolve()) for folder in folders]
    stage.finish("data/results/toy.json", {})
    assert all(folder.is_dir() for folder in folders), "the runner's to drop, once the record is safe"


def test_two_runs_of_the_same_work_do_not_share_a_resume_folder(stage, project):
    code = (
        "import time; from trimtab.pipeline import notebook\n"
        f"stage = notebook.begin({BASE!r})\nstage.resume_folder('work'); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], cwd=project, stdout=subprocess.PIPE, encoding="utf-8")
    assert other.stdout.readline() == "held\n"
    with pytest.raises(InputError, match="in use by another run of the same work"):
        stage.resume_folder("work")
    other.kill()
    other.wait()
    assert stage.resume_folder("work").is_dir()


def test_finish_writes_results_and_drops_scratch(stage, project):
    verdict = Claim("c", "text", "statistic", "above", 0.0, "chance").judge(0.123456789, 0.1, 0.2, "3 seeds")
    work = stage.resume_folder("x")
    stage.finish("data/results/toy.json", {"fvu": {"k=1": 0.123456789}, "n": 3}, [verdict])
    written = json.loads((project / "data/results/toy.json").read_text(encoding="utf-8"))
    assert written["metrics"] == {"fvu": {"k=1": 0.123457}, "n": 3}
    assert written["claims"][0]["outcome"] == "held"
    assert not work.exists()


def test_outside_a_project_it_says_so(tmp_path):
    with pytest.raises(InputError, match="not inside a Trimtab checkout"):
        project_root(tmp_path)
