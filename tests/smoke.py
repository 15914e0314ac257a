"""The pipeline at the smoke scale, run once for all tests that need what it leaves, by whichever process asks first."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from trimtab.pipeline.scales import copy_project

ROOT = Path(__file__).parents[1]
STAGES = [f"sae@{arm}" for arm in ("topk-64", "hierarchical-64")]
STAGES += ["sae_random@topk-64", "sae_random@hierarchical-64", "activations", "activations_random"]
STAGES += ["sae_compare", "sae_splice", "sae_interpret", "sae_probe", "sae_features"]
STAGES += [f"steering@{arm}" for arm in ("steering", "steering-last", "steering-layer14", "full")]
STAGES += ["steering_controls", "steering_compare", "steering_lens"]
STAGES += [f"pretrain@{arm}" for arm in ("softmax", "based", "rebased", "rebased-hybrid", "conv")]
STAGES += ["mqar", "pretrain_text", "pretrain_compare"]
STAGES += [f"repetition@{arm}" for arm in ("untrained", "unlikelihood", "implicit")] + ["repetition_compare"]
"""All between `corpus` and those that show records; `trimtab new` may have added others."""
LAST = ["report", "site"]


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
        encoding="utf-8",
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


def set_parameter(project: Path, section: str, key: str, value: object) -> object:
    path = project / "params.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    before, content[section][key] = content[section][key], value
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return before


def stages(project: Path) -> list[str]:
    """The names that DVC gives the pipeline's stages: `sae@topk-64`."""
    command = ["dvc", "stage", "list", "--name-only"]
    done = subprocess.run(
        command, cwd=project, env=environment(project), capture_output=True, encoding="utf-8", check=True
    )
    return done.stdout.split()


def made(factory: pytest.TempPathFactory, config: pytest.Config) -> tuple[Path, Path]:
    """(a clean copy in which `dvc repro` has run everything, for the tests of DVC; the same without DVC's cache, for
    notebooks run by hand). Processes of one test run share them: the first to ask makes them, the others wait."""
    folder = factory.getbasetemp().parent if hasattr(config, "workerinput") else factory.getbasetemp()
    project, plain = folder / "smoke/project", folder / "smoke/plain"
    with FileLock(folder / "smoke.lock"):
        if not plain.exists():
            shutil.rmtree(project.parent, ignore_errors=True)
            _run(project)
            shutil.copytree(project, plain, ignore=shutil.ignore_patterns("cache", "tmp"))
    return project, plain


def _run(project: Path) -> None:
    copy_project(ROOT, project, "smoke")
    set_parameter(project, "base", "threads", 1)  # the tests run two things side by side
    identity = ["-c", "user.name=trimtab", "-c", "user.email=trimtab@localhost"]
    subprocess.run(["git", *identity, "commit", "--quiet", "--all", "-m", "one thread"], cwd=project, check=True)
    order = ran(repro(project))
    assert (order[:2], order[-2:]) == (["fetch", "corpus"], LAST)
    assert sorted(order) == sorted(stages(project))
    assert set(STAGES) <= set(order)
