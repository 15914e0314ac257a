"""Many jobs: in order, in processes, and only those that are missing."""

import os
from pathlib import Path

import pytest

from trimtab.launch import each


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
