"""A stage's kernel is the project's alone, two runs are equal, and nothing outlives the runner, however it ends."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.smoke import environment
from trimtab.pipeline.kernel import Manager
from trimtab.pipeline.records import read_record

from .test_run import SLEEP, WRITE, assert_failed, assert_gone, outputs, start, statuses
from .toy import call, make

SHOWS = (
    "print({'ä', 'b', 'c', 'dd', 'eee'}, hash('x'), os.environ.get('COLUMNS'))",
    "import time\nfrom tqdm.auto import tqdm\nfor i in tqdm(range(3)):\n    time.sleep(0.02)",
    "import ipywidgets\nipywidgets.IntSlider(value=5)",
    "import os, sys, time\nprint(object(), os.getcwd(), sys.prefix)\nprint('err', file=sys.stderr)\nprint('more')",
    "import matplotlib.pyplot as plt\nplt.plot([1, 3, 2])\nplt.show()",
    "import polars as pl\npl.DataFrame({'a': range(40)})",
    "import matplotlib.pyplot as plt\nfrom matplotlib_inline.backend_inline import set_matplotlib_formats\n"
    "set_matplotlib_formats('svg')\nplt.plot([1, 3, 2])\nplt.show()",
    "from IPython.display import display\n"
    "display({'application/json': {'a': float('nan')}, 'text/plain': 'x'}, raw=True)",
)
MINE = "import builtins\nbuiltins.mine = 1\nopen('mine.txt', 'w').close()\n"


def test_two_runs_are_equal_whatever_the_user_has_set_up(project, run, tmp_path, monkeypatch):
    """Start-up files, a style of figures, hash seeds and tables of the user's, in the second of two runs."""
    records = []
    for name in ("bare", "own"):
        if name == "own":
            home = tmp_path / "home"
            (home / ".ipython/profile_default/startup").mkdir(parents=True)
            (home / ".ipython/profile_default/startup/00-mine.py").write_text(MINE, encoding="utf-8")
            (home / ".ipython/profile_default/ipython_config.py").write_text(
                "c.InteractiveShellApp.exec_lines = ['mine = 1']", encoding="utf-8"
            )
            (home / ".config/matplotlib").mkdir(parents=True)
            (home / ".config/matplotlib/matplotlibrc").write_text(
                "lines.linewidth: 9\nfigure.facecolor: red\n", encoding="utf-8"
            )
            (tmp_path / "startup.py").write_text(MINE, encoding="utf-8")
            monkeypatch.setenv("HOME", str(home))
            monkeypatch.setenv("IPYTHONDIR", str(home / ".ipython"))
            monkeypatch.setenv("MPLCONFIGDIR", str(home / ".config/matplotlib"))
            monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / "startup.py"))
            monkeypatch.setenv("PYTHONHASHSEED", "7")
            monkeypatch.setenv("PYTHONOPTIMIZE", "1")
            monkeypatch.setenv("COLUMNS", "30")
            monkeypatch.setenv("POLARS_FMT_MAX_ROWS", "3")
        (project / "out.txt").unlink(missing_ok=True)
        code, record = run(
            "import builtins, os\nassert not hasattr(builtins, 'mine') and 'mine' not in globals()",
            "import sys\nassert sys.flags.optimize == 0\nassert not os.environ.get('PYTHONSTARTUP')",
            *SHOWS, WRITE, name=name,
        )  # fmt: skip
        assert code == 0, record.cells[0].source
        (provenance,) = [c for c in record.cells if "provenance" in c.metadata.get("tags", [])]
        provenance.source = ""
        record.metadata.trimtab = {key: record.metadata.trimtab[key] for key in ("status", "parameters", "results")}
        records.append(record)
    assert not (project / "mine.txt").exists()
    assert records[0] == records[1]
    seen = outputs(records[0])
    assert "<svg" in seen
    assert "image/png" in seen
    assert "it/s" not in seen
    assert "model_id" not in seen
    written = (project / "records/own.ipynb").read_text(encoding="utf-8")
    json.loads(written, parse_constant=lambda name: pytest.fail(f"{name} in a record"))


def test_a_cell_that_is_to_be_skipped_is_no_failure(project, run, monkeypatch):
    from trimtab.pipeline import run as runner

    def tagged(root, notebook):
        content = read(root, notebook)
        content.cells[2].metadata["tags"] = ["skip-execution"]
        return content

    read = runner.read_source
    monkeypatch.setattr(runner, "read_source", tagged)
    code, record = run("1 / 0", WRITE)
    assert (code, record.metadata.trimtab.status) == (0, "complete")


def test_an_unknown_magic_is_named(project, run):
    code, record = run(WRITE, "%nosuchmagic 3", "print('never')")
    assert code == 1
    assert_failed(project, record, "nosuchmagic")


@pytest.mark.parametrize("results", ["[1, 2]", '{"metrics": 3, "claims": []}', '{"metrics": {}}', '{"metrics": {', ""])
def test_results_that_are_none_leave_no_outputs(project, results, monkeypatch):
    from trimtab.pipeline.run import run_notebook

    from .conftest import make_notebook

    parameters = 'lr: float = 1.0\nsteps: int = 1\nout: str = ""\nresults: str = ""'
    write = f"from pathlib import Path\nPath(out).write_text('x')\nPath(results).write_text({results!r})"
    make_notebook(project, write, parameters=parameters)
    places = {"out": Path("out.txt"), "results": Path("results.json")}
    code = run_notebook(
        Path("toy.ipynb"), Path("records/toy.ipynb"), root=project, sections=["toy"], settings={}, outputs=places
    )
    assert code == 1
    assert_failed(project, read_record(project / "records/toy.ipynb"), "results.json holds no results")
    assert not (project / "results.json").exists()


def test_a_closed_terminal_ends_the_run_with_a_failed_record(project):
    process = start(project, WRITE, SLEEP, "print('never')")
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=30) == 128 + signal.SIGHUP, process.stderr.read()
    record = read_record(project / "records/toy.ipynb")
    assert_failed(project, record, "stopped by SIGHUP")
    assert statuses(record)[-2:] == ["failed", "not run"]
    assert_gone(int((project / "pid").read_text(encoding="utf-8")))


POOL = (
    "from trimtab.launch import each\nimport math\nfrom pathlib import Path\n"
    "each(math.sqrt, [(1.0,), (4.0,), (9.0,)], Path('kept'), identity={}, workers=2)\n"
)


def leftovers() -> set[str]:
    """What processes leave behind: folders of sockets, semaphores and shared memory."""
    found = {str(path) for path in Path("/tmp").glob("tt-*")}
    return found | {str(path) for path in Path("/dev/shm").glob("*") if "mp-" in path.name or "torch" in path.name}


def eventually_no_more_than(before: set[str]) -> None:
    deadline = time.monotonic() + 20
    while left := leftovers() - before:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.2)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="looks into /dev/shm")
@pytest.mark.parametrize("end", ["success", "exception", "kernel killed", "runner killed"])
def test_nothing_is_left_behind(project, end):
    before = leftovers()
    last = {"success": "pass", "exception": "1 / 0", "kernel killed": "os.kill(os.getpid(), 9)", "runner killed": SLEEP}
    process = start(project, WRITE, POOL, "import os\nopen('pid', 'w').write(str(os.getpid()))", last[end])
    if end == "runner killed":
        process.kill()
    process.wait(timeout=60)
    assert_gone(int((project / "pid").read_text(encoding="utf-8")))
    eventually_no_more_than(before)


def test_a_stage_ends_when_dvc_is_killed(tmp_path):
    project = tmp_path / "toy"
    parameters = 'length: int = 1\nout: str = "out"\nresults: str = "results.json"'
    make(project, parameters, SLEEP)
    (project / "params.yaml").write_text("toy: {length: 1}\n", encoding="utf-8")
    for shell in ("/bin/sh", "/bin/bash"):
        if not Path(shell).exists():
            continue
        (project / "pid").unlink(missing_ok=True)
        variables = environment(project) | {"SHELL": shell}
        dvc = subprocess.Popen(["dvc", "repro"], cwd=project, env=variables, stderr=subprocess.PIPE, encoding="utf-8")
        deadline = time.monotonic() + 120
        while not (project / "pid").exists() or not (project / "pid").read_text(encoding="utf-8"):
            assert time.monotonic() < deadline, "the kernel did not start"
            time.sleep(0.1)
        dvc.kill()
        dvc.wait()
        assert_gone(int((project / "pid").read_text(encoding="utf-8")))
        deadline = time.monotonic() + 30
        while not (project / "records/toy.ipynb").exists():
            assert time.monotonic() < deadline, "the runner left no record"
            time.sleep(0.1)
        assert "stopped by SIGTERM" in read_record(project / "records/toy.ipynb").cells[0].source


def test_a_user_without_a_name_is_told_at_the_start(tmp_path, monkeypatch):
    from trimtab.errors import InputError
    from trimtab.pipeline import run as runner

    def nameless():
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(runner.getpass, "getuser", nameless)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    runner.refuse_nameless_user()
    monkeypatch.setenv("DVC_STAGE", "toy")
    with pytest.raises(InputError, match="This user has no name, which DVC needs in the end"):
        runner.refuse_nameless_user()


def test_why_a_pipeline_stopped_is_one_command_away(tmp_path):
    project = tmp_path / "toy"
    make(project, 'length: int = 1\nout: str = "out"\nresults: str = "r.json"', "1 / 0")
    (project / "params.yaml").write_text("toy: {lengths: 1}\n", encoding="utf-8")
    assert call(project, "dvc", "repro").returncode
    assert call(project, "trimtab", "why").stdout.startswith("toy: `lengths` of section `toy` is no parameter")
    (project / "params.yaml").write_text("toy: {length: 1}\n", encoding="utf-8")
    assert call(project, "dvc", "repro").returncode
    assert call(project, "trimtab", "why").stdout == (
        "toy: the notebook failed, its record records/toy.ipynb says where\n"
    )


def test_the_variables_of_a_kernel_are_those_of_this_process_less_the_users_own(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("PYTHONSTARTUP", "mine.py")
    manager = Manager(kernel_name="python3")
    try:
        found = manager.environment()
    finally:
        manager.end()
    assert found["OMP_NUM_THREADS"] == "3"
    assert "PYTHONSTARTUP" not in found
    assert not manager.folder.exists()
    assert found["PATH"] == os.environ["PATH"]
