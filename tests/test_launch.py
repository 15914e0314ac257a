"""Many jobs: in order, in processes, and only those that are missing."""

import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from trimtab.errors import InputError
from trimtab.launch import CHECKPOINT, each

ROOT = Path(__file__).parents[1]


def square(x, log):
    with Path(log).open("a", encoding="utf-8") as file:
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
    lines = log.read_text(encoding="utf-8").split()
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
    with pytest.raises(InputError, match=r"killed by SIGKILL, perhaps for want of memory: lower `workers`"):
        each(die, [(0,)], tmp_path / "lost", workers=2)
    assert not pids("third") & first


def die_or_finish(number, folder):
    """The first dies when the second has begun, which ends later."""
    mark = Path(folder) / "begun"
    if number == 0:
        while not mark.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    mark.touch()
    time.sleep(0.5)
    return number


def test_a_worker_that_dies_costs_no_finished_result(tmp_path):
    jobs = [(number, str(tmp_path)) for number in range(4)]
    with pytest.raises(InputError, match="finished results are kept"):
        each(die_or_finish, jobs, tmp_path / "kept", workers=2)
    assert len(list((tmp_path / "kept").glob("*.json"))) == 1


def scaled(factor, x):
    return factor * x


def shifted(factor, x):
    return factor + x


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"function": partial(shifted, 2)}, "function scaled there, shifted here"),
        ({"function": partial(scaled, 3)}, "argument 0 2 there, 3 here"),
        ({"identity": {"text": torch.ones(3)}}, "text"),
        ({"identity": {"text": torch.zeros(3, dtype=torch.int32)}}, "text"),
        ({"threads": 2}, "threads 1 there, 2 here"),
    ],
    ids=["function", "argument", "data", "type", "threads"],
)
def test_results_of_another_identity_are_told_of_kept_and_found_again(tmp_path, capfd, change, told):
    first = {"function": partial(scaled, 2), "identity": {"text": torch.zeros(3)}, "threads": 1}

    def run(function, identity, threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return each(function, [(1,), (2,)], tmp_path, identity=identity)
        finally:
            torch.set_num_threads(before)

    assert run(**first) == [2, 4]
    second = first | change
    assert run(**second) == [second["function"](1), second["function"](2)]
    lines = [line for line in capfd.readouterr().err.splitlines() if "of another run" in line]
    assert len(lines) == 1, "one line"
    assert f"is of another run ({told}" in lines[0]
    assert run(**first) == [2, 4]
    assert "of another run" not in capfd.readouterr().err
    assert len(list(tmp_path.glob("*.json"))) == 4


def counted(log, *job):
    with Path(log).open("a", encoding="utf-8") as file:
        file.write(f"{job}\n")
    return [type(value).__name__ for value in job]


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_that_look_alike_are_told_apart_and_equal_ones_are_run_once(tmp_path, workers):
    jobs = [(1,), (True,), (1.0,), ("1",), (1,), ({1: "a"},), ({"1": "a"},)]
    found = each(partial(counted, str(tmp_path / "log")), jobs, tmp_path / "kept", workers=workers)
    assert found == [["int"], ["bool"], ["float"], ["str"], ["int"], ["dict"], ["dict"]]
    assert len((tmp_path / "log").read_text(encoding="utf-8").splitlines()) == 6
    assert len(list((tmp_path / "kept").glob("*.json"))) == 6


def test_a_closure_is_known_by_what_it_was_made_with(tmp_path):
    def made(factor):
        return lambda x: factor * x

    assert each(made(2), [(1,)], tmp_path) == [2]
    assert each(made(3), [(1,)], tmp_path) == [3]
    assert each(lambda x: x + 7, [(1,)], tmp_path) == [8]
    assert each(lambda x: x - 7, [(1,)], tmp_path) == [-6]


class Times:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return self.factor * x

    def of(self, x):
        return self.factor * x


class Known(Times):
    """Says itself what it computes by: not by what it was read from."""

    def __init__(self, factor, read_from):
        super().__init__(factor)
        self.read_from = read_from

    @property
    def identity(self):
        return {"factor": self.factor}


def with_default(factor):
    def times(x, factor=factor):
        return factor * x

    return times


def weighted(threads, code, x):
    return threads[0] * code * x


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: 2 * x, lambda x: 3 * x),
        (with_default(2), with_default(3)),
        (Times(2), Times(3)),
        (Times(2).of, Times(3).of),
        (partial(Times(2)), partial(Times(3))),
        (partial(partial(scaled, 2)), partial(partial(scaled, 3))),
        (partial(weighted, [2], 1), partial(weighted, [3], 1)),
        (partial(weighted, threads=[1], code=2), partial(weighted, threads=[1], code=3)),
        (partial(weighted, threads=[2], code=1), partial(weighted, threads=[3], code=1)),
        (eval("lambda x: 2 * x"), eval("lambda x: 3 * x")),
        (Known(2, "here"), Known(3, "here")),
    ],
)  # fmt: skip
def test_functions_that_compute_otherwise_share_no_result(tmp_path, one, other):
    if isinstance(one, partial) and one.keywords:
        one, other = (partial(_called_with, function) for function in (one, other))
    for _ in range(2):
        assert each(one, [(1,)], tmp_path) == [2]
        assert each(other, [(1,)], tmp_path) == [3]
    assert len(list(tmp_path.glob("*.json"))) == 2


def _called_with(function, x):
    return function(x=x)


def test_what_an_object_says_it_computes_by_is_all_that_counts(tmp_path):
    each(Known(2, "here"), [(1,)], tmp_path)
    each(partial(Known(2, "there")), [(1,)], tmp_path)
    each(Known(2, "there").of, [(1,)], tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 2, "the method is another function"


@pytest.mark.parametrize(
    "text", ["{}", "[]", "null", "3", '"result"', "", '{"result": ', '{"identity": [], "job": {}}', "\0"]
)
def test_a_file_without_a_result_is_put_aside_and_its_job_run_again(tmp_path, capfd, text):
    assert each(partial(scaled, 2), [(1,), (2,)], tmp_path) == [2, 4]
    file = sorted(tmp_path.glob("*.json"))[0]
    file.write_text(text, encoding="utf-8")
    capfd.readouterr()
    assert each(partial(scaled, 2), [(1,), (2,)], tmp_path) == [2, 4]
    told = [line for line in capfd.readouterr().err.splitlines() if str(file) in line]
    assert len(told) == 1
    assert "holds no result: it is kept as" in told[0]
    assert file.with_suffix(".damaged").read_text(encoding="utf-8") == text


def placed(x, place):
    place.mkdir(parents=True, exist_ok=True)
    (place / CHECKPOINT).write_text("half", encoding="utf-8")
    (place / "model").write_text(str(x), encoding="utf-8")
    return place.name


def test_each_job_and_identity_has_a_place_of_its_own(tmp_path):
    places = [each(placed, [(1,), (2,)], tmp_path, identity=text, places=True) for text in ("one", "other")]
    names = [name for found in places for name in found]
    assert len(set(names)) == 4
    assert [(tmp_path / name / "model").read_text(encoding="utf-8") for name in names] == ["1", "2", "1", "2"]
    assert not list(tmp_path.glob(f"*/{CHECKPOINT}"))


def not_a_number(_):
    return {"loss": math.nan, "worst": math.inf}


def test_a_run_that_fell_apart_is_kept_too(tmp_path):
    for _ in range(2):
        (found,) = each(not_a_number, [(0,)], tmp_path)
        assert math.isnan(found["loss"])
        assert found["worst"] == math.inf


def unpicklable(_):
    return lambda: None


@pytest.mark.parametrize("workers", [0, -1])
def test_at_least_one_worker_is_asked_for(tmp_path, workers):
    with pytest.raises(InputError, match="workers must be positive"):
        each(own_pid, [(0,)], tmp_path, workers=workers)


def test_an_outcome_that_no_process_can_send_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="outcome cannot be sent"):
        each(unpicklable, [(0,)], tmp_path, workers=2)


def test_a_failure_in_a_process_says_where_it_was(tmp_path):
    with pytest.raises(ValueError, match="negative") as raised:
        each(square, [(-1, str(tmp_path / "log"))], tmp_path / "kept", workers=2)
    assert "in square" in "".join(raised.value.__notes__)


SCRIPT = """
import os, sys
from pathlib import Path
from tests.test_launch import die, own_pid
from trimtab.launch import each
if __name__ == "__main__":
    how, folder = sys.argv[1:]
    print(*each(own_pid, [(i,) for i in range(4)], Path(folder), workers=2), flush=True)
    if how == "broken":
        each(die, [(0,)], Path(folder) / "lost", workers=2)
    if how == "killed":
        os.kill(os.getpid(), 9)
    if how == "raised":
        raise SystemExit(3)
"""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="reads /dev/shm")
@pytest.mark.parametrize("how", ["normal", "broken", "raised", "killed"])
def test_nothing_is_left_of_a_pool_however_its_parent_ends(tmp_path, how):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    before = set(Path("/dev/shm").glob("sem.mp*"))
    done = subprocess.run(
        [sys.executable, str(script), how, str(tmp_path / "kept")],
        env=here,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    pids = {int(pid) for pid in done.stdout.split()}
    assert pids, done.stderr
    assert done.returncode == {"normal": 0, "broken": 1, "raised": 3, "killed": -9}[how], done.stderr
    deadline = time.monotonic() + 20
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.1)
    assert set(Path("/dev/shm").glob("sem.mp*")) <= before


def settings():
    return [torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()]


def test_workers_compute_as_their_parent_does(tmp_path):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert each(settings, [()], tmp_path / "kept", workers=2) == [[max(1, torch.get_num_threads() // 2), True]]
    finally:
        torch.use_deterministic_algorithms(False)


def wait_for_ever(folder, number):
    (Path(folder) / f"{number}.pid").write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(600)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """Else they would write beside the run that takes up where this one ended."""
    script = tmp_path / "parent.py"
    script.write_text(
        "from pathlib import Path\nfrom tests.test_launch import wait_for_ever\nfrom trimtab.launch import each\n"
        f"jobs = [({str(tmp_path)!r}, 1), ({str(tmp_path)!r}, 2)]\n"
        "if __name__ == '__main__':\n    each(wait_for_ever, jobs, Path('kept'), workers=2)\n",
        encoding="utf-8",
    )
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    with subprocess.Popen([sys.executable, str(script)], cwd=tmp_path, env=here) as parent:
        deadline = time.monotonic() + 120
        while len(written := [path for path in tmp_path.glob("*.pid") if path.read_text(encoding="utf-8")]) < 2:
            assert time.monotonic() < deadline, "the workers did not begin"
            time.sleep(0.1)
        pids = [int(path.read_text(encoding="utf-8")) for path in written]
        assert all(map(alive, pids))
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.1)
