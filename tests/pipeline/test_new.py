"""`trimtab new`: what it adds passes the project's own checks at once, and a bad name changes nothing."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.smoke import environment
from trimtab.errors import InputError
from trimtab.pipeline.new import add_experiment
from trimtab.pipeline.scales import copy_project


@pytest.fixture(scope="module")
def project(root, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("new") / "project"
    copy_project(root, folder, "laptop")
    return folder


def changed(project: Path) -> list[str]:
    done = subprocess.run(["git", "status", "--porcelain", "-uall"], cwd=project, capture_output=True, encoding="utf-8")
    return sorted(line[3:] for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Word use", "is no name for an experiment"),
        ("import", "is no name for an experiment"),
        ("mqar", "mqar is taken: there is notebooks/mqar.ipynb and stage mqar of dvc.yaml"),
        ("claims", "claims is taken: there is tests/test_claims.py already"),
    ],
)
def test_a_name_that_is_none_or_is_taken_changes_nothing(project, name, said):
    with pytest.raises(InputError, match=said):
        add_experiment(project, name)
    assert changed(project) == []


def test_what_it_adds_passes_the_projects_own_checks(project, root):
    subprocess.run(["trimtab", "new", "word_use"], cwd=project, env=environment(project), check=True)
    added = ["notebooks/word_use.ipynb", "tests/test_word_use.py"]
    assert changed(project) == sorted(["conf/config.yaml", "conf/scale/smoke.yaml", "dvc.yaml", "params.yaml", *added])
    diff = subprocess.run(["git", "diff", "--numstat"], cwd=project, capture_output=True, encoding="utf-8", check=True)
    assert all(line.split()[1] == "0" for line in diff.stdout.splitlines()), "lines were taken away"
    with pytest.raises(InputError, match="word_use is taken"):
        add_experiment(project, "word_use")
    for command in (["ruff", "check"], ["ruff", "format", "--check"]):
        subprocess.run([*command, *added], cwd=project, env=environment(project), check=True)
    (project / "records").mkdir(exist_ok=True)
    shutil.copy(root / "records/README.md", project / "records")  # a copy begins without what was produced
    checks = ["pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/test_hygiene.py", added[1]]
    checks += ["-k", "word_use or composed"]
    done = subprocess.run(
        checks, cwd=project, env=environment(project), capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 7, "the checks passed it over"
