"""Every fault that the runner must survive, caused for real."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trimtab.errors import InputError
from trimtab.pipeline.records import read_record
from trimtab.pipeline.run import run_notebook
from trimtab.pipeline.terminal import LOG

from .conftest import make_notebook

WRITE = "from pathlib import Path\nPath(out).write_text(f'{lr} {steps} {name}')"


def text(record) -> str:
    return "\n".join(cell.source for cell in record.cells)


def outputs(record) -> str:
    return json.dumps([cell.get("outputs", []) for cell in record.cells], ensure_ascii=False)


def statuses(record) -> list[str]:
    return [c.metadata.trimtab.status for c in record.cells if "trimtab" in c.metadata]


def assert_failed(project, record, reason: str) -> None:
    assert record.metadata.trimtab.status == "failed"
    assert record.cells[0].source.startswith("> **FAILED**")
    assert reason in record.cells[0].source
    assert not (project / "out.txt").exists(), "an output was left that looks complete"


def test_a_good_run_injects_its_section_and_writes_everything(project, run):
    code, record = run(WRITE, settings={"name": "given"})
    assert code == 0
    assert (project / "out.txt").read_text(encoding="utf-8") == "0.5 7 given"
    assert record.metadata.trimtab.status == "complete"
    provenance = next(c.source for c in record.cells if "provenance" in c.metadata.get("tags", []))
    for word in ("outcome | complete", '"lr": 0.5', "torch ", "wall time", "peak memory", "cores", "commit"):
        assert word in provenance
    assert "papermill" not in json.dumps([c.metadata for c in record.cells] + [record.metadata])
    assert "secret" not in json.dumps(record), "an undeclared section leaked"


def test_the_kernel_is_this_environment_on_unix_sockets_in_the_root(project, run):
    code, record = run(
        "import sys, os, json\nfrom ipykernel.kernelapp import IPKernelApp\n"
        "print(json.dumps([sys.executable, os.getcwd(), IPKernelApp.instance().transport]))",
        WRITE,
    )
    assert code == 0
    seen = outputs(record)
    assert "ipc" in seen
    assert str(Path(sys.executable).name) in seen
    assert str(project) not in seen, "the path of this machine is in the record"


def test_an_exception_fails_the_run_and_marks_what_never_ran(project, run):
    code, record = run(WRITE, "1 / 0", "print('never')", "print('never either')")
    assert code == 1
    assert_failed(project, record, "ZeroDivisionError: division by zero. Cells that never ran: 2")
    assert statuses(record) == ["complete", "complete", "complete", "failed", "not run", "not run"]
    assert text(record).count("The next cell was not run") == 2
    assert "ZeroDivisionError" in outputs(record)


@pytest.mark.parametrize(
    ("death", "reason"),
    [
        ("import os; os._exit(0)", "the kernel died (exit code 0)"),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "the kernel died (SIGKILL, perhaps for want of memory)",
        ),
        ("import ctypes; ctypes.string_at(0)", "the kernel died (SIGSEGV)"),
    ],
)
def test_a_dead_kernel_is_a_failure(project, run, death, reason):
    code, record = run(WRITE, death, "print('never')")
    assert code == 1
    assert_failed(project, record, reason)
    assert statuses(record)[-2:] == ["failed", "not run"]


def test_a_timeout_is_a_failure_and_leaves_no_kernel(project, run):
    code, record = run(
        WRITE, "import os, time\nPath('pid').write_text(str(os.getpid()))\ntime.sleep(60)", cell_timeout=2
    )
    assert code == 1
    assert_failed(project, record, "the cell took longer than its limit of 2 s")
    assert_gone(int((project / "pid").read_text(encoding="utf-8")))


def test_leaving_early_is_a_failure(project, run):
    code, record = run(WRITE, "import sys; sys.exit(0)", "print('never')")
    assert code == 1
    assert_failed(project, record, "the notebook ended early: a cell called exit()")
    assert statuses(record)[-1] == "not run"


def test_a_log_linked_into_a_cache_is_replaced_and_not_written_through(project, run):
    (project / "records").mkdir()
    (project / "cached").write_text(f"{LOG}as cached", encoding="utf-8")
    (project / "records/toy.log").hardlink_to(project / "cached")
    assert run(WRITE)[0] == 0
    assert (project / "cached").read_text(encoding="utf-8") == f"{LOG}as cached"


def test_provenance_is_of_the_commit_that_the_run_began_with(project):
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]

    def git(*arguments):
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=project, capture_output=True, encoding="utf-8", check=True).stdout

    def revision():
        outputs, record = {"out": Path("out.txt")}, Path("records/toy.ipynb")
        assert (
            run_notebook(Path("toy.ipynb"), record, root=project, sections=["toy"], settings={}, outputs=outputs) == 0
        )
        cells = read_record(project / record).cells
        (cell,) = [cell for cell in cells if "provenance" in cell.metadata.get("tags", [])]
        return cell.source.split("commit |")[1].splitlines()[0]

    git("init", "-q")
    make_notebook(project, WRITE, f"import subprocess\nsubprocess.run(['git', *{identity}, 'commit', '-qam', 'two'])")
    git("add", "-A")
    git("commit", "-qm", "one")
    (project / "data/results").mkdir(parents=True)
    (project / "data/results/x.json").write_text(
        "{}", encoding="utf-8"
    )  # a product of the pipeline makes nothing dirty
    head = git("rev-parse", "--short=12", "HEAD").strip()
    assert revision() == f" `{head}` |"
    (project / "params.yaml").write_text(
        (project / "params.yaml").read_text(encoding="utf-8") + "# edited\n", encoding="utf-8"
    )
    assert revision() == f" `{head}` with uncommitted changes |"
    assert git("rev-parse", "--short=12", "HEAD").strip() != head, "the notebook was to commit while it ran"


@pytest.mark.parametrize("content", ["{}", "not json", '{"cells": 3}'])
def test_what_is_no_notebook_is_named(project, content):
    (project / "toy.ipynb").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"toy\.ipynb is not a notebook"):
        run_notebook(Path("toy.ipynb"), Path("r.ipynb"), root=project, sections=[], settings={}, outputs={})


def test_a_missing_output_is_a_failure(project, run):
    code, record = run("pass")
    assert code == 1
    assert_failed(project, record, "every cell ran, but out.txt was not written")


def test_the_log_holds_prints_and_no_progress_bars(project, run):
    run("print('hello from the cell')", "from tqdm import tqdm\nlist(tqdm(range(1000), desc='bar'))", WRITE)
    log = (project / "records/toy.log").read_text(encoding="utf-8")
    assert "hello from the cell" in log
    assert "complete after" in log
    assert "bar:" not in log


def start(project, *cells) -> subprocess.Popen:
    make_notebook(project, *cells)
    code = "from trimtab.pipeline.cli import main; main()"
    arguments = ["run", "toy.ipynb", "--section", "toy", "--out", "out=out.txt"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=project,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # under nohup it would be ignored
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    deadline = time.monotonic() + 60
    while not (project / "pid").exists() or not (project / "pid").read_text(encoding="utf-8"):
        assert time.monotonic() < deadline, "the kernel did not start"
        time.sleep(0.05)
    return process


def assert_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":
            return
        time.sleep(0.1)
    raise AssertionError(f"kernel {pid} outlived its runner")


SLEEP = "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(120)"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_give_a_failed_record_and_no_orphan(project, number, code):
    process = start(project, WRITE, SLEEP, "print('never')")
    process.send_signal(number)
    assert process.wait(timeout=30) == code, process.stderr.read()
    record = read_record(project / "records/toy.ipynb")
    assert_failed(project, record, f"stopped by {number.name}")
    assert statuses(record)[-2:] == ["failed", "not run"]
    assert_gone(int((project / "pid").read_text(encoding="utf-8")))


def test_a_killed_runner_leaves_no_kernel_and_no_record(project):
    process = start(project, WRITE, SLEEP)
    process.kill()
    process.wait()
    assert not (project / "records/toy.ipynb").exists()
    assert_gone(int((project / "pid").read_text(encoding="utf-8")))


def test_bad_parameters_stop_before_a_kernel_starts(project):
    make_notebook(project, WRITE)
    (project / "params.yaml").write_text("toy: {lr: 0.5, stepz: 7}\n", encoding="utf-8")
    code = "from trimtab.pipeline.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "toy.ipynb", "--section", "toy"],
        cwd=project,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 2
    assert (
        done.stderr.strip() == "trimtab: `stepz` of section `toy` is no parameter of toy.ipynb; did you mean `steps`?"
    )
    assert not (project / "records").exists()
