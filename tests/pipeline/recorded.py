"""A toy pipeline with two commits, each with its run, to be shown, compared and harmed."""

import json
from pathlib import Path

import nbformat
import yaml
from typer.testing import CliRunner

from trimtab.pipeline.cli import app
from trimtab.pipeline.records import signed

from .toy import make, succeed

PARAMETERS = 'lr: float = 0.1\ndecay: float = 0.1\nfails: bool = False\nout: str = "out"\nresults: str = "results.json"'
WORK = """
import json
from pathlib import Path
assert not fails, "as asked"
Path(out).parent.mkdir(exist_ok=True)
Path(out).write_text(str(lr))
claim = {"name": "c", "text": "It works", "statistic": "ratio", "rule": "above 0",
         "outcome": "held" if lr > 0.3 else "not held", "effect": lr, "low": lr - 0.1, "high": None, "n": "3 seeds"}
Path(results).parent.mkdir(parents=True, exist_ok=True)
Path(results).write_text(json.dumps({"metrics": {"rows": 3, "arm": {"k=2": lr}}, "claims": [claim]}))
print("lr is", lr)
"""


def set_parameters(folder: Path, **values) -> None:
    """`decay` is a number that DVC writes as 1e-05, a string to readers of YAML 1.1."""
    (folder / "params.yaml").write_text(
        yaml.safe_dump({"toy": {"lr": 0.25, "decay": 1e-05, "fails": False} | values}), encoding="utf-8"
    )


def make_two_commits(folder: Path) -> None:
    """A learning rate of 0.25, then one of 0.5."""
    make(folder, PARAMETERS, WORK)
    for lr in (0.25, 0.5):
        set_parameters(folder, lr=lr)
        succeed(folder, "dvc", "repro", "--quiet")
        succeed(folder, "git", "add", "--all")
        identity = ["-c", "user.name=toy", "-c", "user.email=toy@localhost"]
        succeed(folder, "git", *identity, "commit", "--quiet", "-m", str(lr))


def ask(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["records", *arguments], env={"COLUMNS": "160"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def change(project: Path, edit, *, sign: bool = False) -> None:
    """Edit the record in place, as somebody with an editor would; `sign`: who mends its digest, too."""
    path = project / "records/toy.ipynb"
    record = json.loads(path.read_text(encoding="utf-8"))
    edit(record)
    if sign:
        record = json.loads(nbformat.writes(signed(nbformat.from_dict(record))))
    path.unlink()  # it may be a link into DVC's cache
    path.write_text(json.dumps(record), encoding="utf-8")


def commit_all(folder: Path) -> None:
    """Tell DVC that all is as it should be."""
    succeed(folder, "dvc", "commit", "--force", "--quiet")
