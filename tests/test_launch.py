"""Many jobs: in order, in processes, and only those that are missing."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

from trimtab.launch import each

ROOT = Path(__file__).parents[1]


def square(x, log):
    with Path(log).open("a") as file:
        file.write(f"{os.getpid()} {x}\n")
    if x < 0:
        raise ValueError("negative")
    return {"square": x * x}


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_jobs_and_are_kept(tmp_path, workers):
    log = tmp_path / "log"
    jobs = [(x, str(log)) for x in (3, 1, 2)]
    assert each(square, jobs, tmp_path / "kept", workers=workers) == [{"square": x * x} for x in (3, 1, 2)]
    assert each(square, [*jobs, (4, str(log))], tmp_path / "kept", workers=workers)[3] == {"square": 16}
    lines = log.read_text().split()
    assert lines[1::2].count("4") == 1
    assert len(lines[1::2]) == 4, "what is there is not run again"
    assert (str(os.getpid()) in lines) == (workers == 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_was_finished_before_a_failure_stays(tmp_path, workers):
    log = tmp_path / "log"
    with pytest.raises(ValueError, match="negative"):
        each(square, [(1, str(log)), (-1, str(log))], tmp_path / "kept", workers=workers)
    assert len(list((tmp_path / "kept").glob("*.json"))) == 1


def own_pid(_job):
    return os.getpid()


def die(_job):
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_next_call_has_the_same_processes_unless_one_was_lost(tmp_path):
    def pids(folder):
        return set(each(own_pid, [(i,) for i in range(4)], tmp_path / folder, workers=2))

    first = pids("first")
    assert os.getpid() not in first
    assert pids("second") & first
    with pytest.raises(BrokenProcessPool):
        each(die, [(0,)], tmp_path / "lost", workers=2)
    assert not pids("third") & first


def settings():
    return [torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()]


def test_workers_compute_as_their_parent_does(tmp_path):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert each(settings, [()], tmp_path / "kept", workers=2) == [[max(1, torch.get_num_threads() // 2), True]]
    finally:
        torch.use_deterministic_algorithms(False)


def wait_for_ever(folder, number):
    (Path(folder) / f"{number}.pid").write_text(str(os.getpid()))
    time.sleep(600)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """Else they would write beside the run that takes up where this one ended."""
    script = tmp_path / "parent.py"
    script.write_text(
        "from pathlib import Path\nfrom tests.test_launch import wait_for_ever\nfrom trimtab.launch import each\n"
        f"jobs = [({str(tmp_path)!r}, 1), ({str(tmp_path)!r}, 2)]\n"
        "if __name__ == '__main__':\n    each(wait_for_ever, jobs, Path('kept'), workers=2)\n"
    )
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    with subprocess.Popen([sys.executable, str(script)], cwd=tmp_path, env=here) as parent:
        deadline = time.monotonic() + 120
        while len(written := [path for path in tmp_path.glob("*.pid") if path.read_text()]) < 2:
            assert time.monotonic() < deadline, "the workers did not begin"
            time.sleep(0.1)
        pids = [int(path.read_text()) for path in written]
        assert all(map(alive, pids))
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.1)
