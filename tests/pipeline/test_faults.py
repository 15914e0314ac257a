"""What happens to machines and projects happens to a toy pipeline: a full disk, a read-only one, two runs at once, a
clock set back, a notebook renamed. Each ends in a clear sentence, and nothing is lost."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.smoke import environment, ran
from trimtab.pipeline.conditions import conditions
from trimtab.pipeline.records import read_record

from .toy import RUN, call, make

WORK = """
import json, time
from pathlib import Path
from trimtab.files import atomic, write_json
kept = Path("scratch/kept")
if not kept.exists():
    with atomic(kept) as partial:
        partial.write_text("finished")
with atomic(Path(out)) as partial:
    partial.write_bytes(b"x" * length)
time.sleep(seconds)
write_json(Path(results), {"metrics": {"length": length}, "claims": []})
if fills:
    with open("filler", "wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            pass
"""
PARAMETERS = (
    'length: int = 1\nseconds: float = 0.0\nfills: bool = False\nout: str = "out"\nresults: str = "results.json"'
)
DISK = "mkdir -p disk && mount -t tmpfs -o size=4m tmpfs disk && cp -r .git .dvc notebooks *.yaml disk && cd disk"
"""A disk of four megabytes, with the project on it."""


def set_parameters(folder: Path, **values) -> None:
    (folder / "params.yaml").write_text(
        yaml.safe_dump({"toy": {"length": 10, "seconds": 0.0, "fills": False} | values}), encoding="utf-8"
    )


@pytest.fixture
def project(tmp_path) -> Path:
    folder = tmp_path / "toy"
    make(folder, PARAMETERS, WORK)
    set_parameters(folder)
    return folder


def within(project: Path, mounts: str, *commands: str) -> subprocess.CompletedProcess[str]:
    """Run shell commands in the project, under mounts of their own that end with them."""
    space = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or call(project, *space, "true").returncode:
        pytest.skip("needs `unshare` (util-linux) and user namespaces, to mount a disk of its own")
    return call(project, *space, "sh", "-c", f"{mounts} && cd . && {'; '.join(commands)}")


def test_a_full_disk_fails_the_run_in_one_sentence_and_keeps_what_was_finished(project):
    set_parameters(project, length=8_000_000)
    look = "ls data; cat scratch/kept; cp records/toy.ipynb .."
    less = "sed -i 's/length: .*/length: 1000/' params.yaml"
    done = within(project, DISK, RUN, "echo first $?", look, less, RUN, "echo second $?")
    assert "first 1" in done.stdout, done.stdout + done.stderr
    assert "data/toy was not written, the disk is full: free some space" in done.stderr.replace("\n", "")
    assert "finished" in done.stdout
    assert "toy\n" not in done.stdout, "an output was left that looks complete"
    failed = read_record(project / "toy.ipynb")
    assert failed.metadata.trimtab.status == "failed"
    assert "the disk is full" in failed.cells[0].source
    assert "second 0" in done.stdout


def test_a_disk_without_room_for_the_record_leaves_no_results(project):
    set_parameters(project, fills=True)
    done = within(project, DISK, RUN, "echo code $?", "ls data data/results records")
    assert "code 2" in done.stdout, done.stdout + done.stderr
    assert "records/toy.ipynb was not written, the disk is full" in done.stderr.replace("\n", "")
    assert "Traceback" not in done.stderr
    assert "toy.json" not in done.stdout, "results without a record"
    assert "toy.ipynb" not in done.stdout


def test_a_read_only_folder_is_named(project):
    (project / "records").mkdir()
    mounts = "mount --bind records records && mount -o remount,ro,bind records"
    done = within(project, mounts, RUN, "echo code $?")
    assert "code 2" in done.stdout
    assert "records" in done.stderr
    assert "cannot be written, it is read-only or not yours" in done.stderr.replace("\n", "")
    assert "Traceback" not in done.stderr
    assert not (project / "data/toy").exists()


def test_of_two_runs_at_once_the_second_is_told_and_the_first_finishes(project):
    set_parameters(project, seconds=15.0)
    first = subprocess.Popen(
        ["dvc", "repro"],
        cwd=project,
        env=environment(project),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    deadline = time.monotonic() + 300
    while not (project / "data/toy").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    second = call(project, "dvc", "repro")
    said = second.stdout + second.stderr
    assert second.returncode != 0
    assert "busy" in said or "lock" in said, said
    assert "Traceback" not in said
    told, _ = first.communicate(timeout=300)
    assert first.returncode == 0, told
    assert (project / "data/toy").read_bytes() == b"x" * 10
    assert [each.state for each in conditions(project)] == ["fresh"]


def test_why_some_names_are_refused_to_parameters(project):
    """DVC's run cache takes no notice of a key `size`: the day this fails, `parameters.UNSEEN` can go."""
    command = "sleep 0; cp params.yaml made"
    stage = {"cmd": command, "params": ["toy"], "deps": ["notebooks/toy.ipynb"], "outs": ["made"]}
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"toy": stage}}), encoding="utf-8")
    for name, again in (("size", []), ("width", ["toy"])):
        for value, expected in ((1, ["toy"]), (2, again)):
            (project / "params.yaml").write_text(yaml.safe_dump({"toy": {name: value}}), encoding="utf-8")
            assert ran(call(project, "dvc", "repro").stdout) == expected


def test_a_clock_that_is_wrong_changes_nothing(project):
    """Files of a year ago, and files of next year, as a clock set back makes of today's."""
    assert ran(call(project, "dvc", "repro").stdout) == ["toy"]
    for length, days in ((11, -400), (12, 400)):
        _set_the_clock(project, time.time() + days * 86_400, length)


def _set_the_clock(project: Path, then: float, length: int) -> None:
    for path in [
        *project.glob("*.yaml"),
        *project.glob("notebooks/*"),
        *project.glob("data/**/*"),
        project / "dvc.lock",
    ]:
        os.utime(path, (then, then))
    assert [each.state for each in conditions(project)] == ["fresh"]
    assert ran(call(project, "dvc", "repro").stdout) == []
    set_parameters(project, length=length)
    os.utime(project / "params.yaml", (then - 86_400, then - 86_400))  # older than what was made from the one before
    assert [each.state for each in conditions(project)] == ["stale"]
    done = call(project, "dvc", "repro")
    assert ran(done.stdout) == ["toy"], done.stdout + done.stderr
    assert (project / "data/toy").stat().st_size == length


def test_a_renamed_notebook_is_named_and_its_record_kept(project):
    assert call(project, "dvc", "repro").returncode == 0
    (project / "notebooks/toy.ipynb").rename(project / "notebooks/new.ipynb")
    done = call(project, "dvc", "repro")
    assert done.returncode != 0
    assert "notebooks/toy.ipynb" in done.stdout + done.stderr
    verified = call(project, "trimtab", "records", "verify")
    assert verified.returncode == 1
    assert "toy: stale: notebooks/toy.ipynb deleted" in verified.stdout
    assert (
        call(project, "dvc", "checkout").returncode == 0
    )  # a failed `dvc repro` takes outputs away, not from its cache
    assert read_record(project / "records/toy.ipynb").metadata.trimtab.status == "complete"
    renamed = (
        (project / "dvc.yaml")
        .read_text(encoding="utf-8")
        .replace("toy.ipynb", "new.ipynb")
        .replace("toy.log", "new.log")
    )
    (project / "dvc.yaml").write_text(renamed, encoding="utf-8")
    assert call(project, "dvc", "repro").returncode == 0
    verified = call(project, "trimtab", "records", "verify")
    assert (verified.returncode, verified.stdout.splitlines()[-1]) == (0, "1 of 1 stages are fresh.")
    assert "records/toy.ipynb belongs to no stage" in verified.stdout
