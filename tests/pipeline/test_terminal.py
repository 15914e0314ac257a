"""Progress bars are shown and not kept; everything else is kept."""

import contextlib
import io
import itertools
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from trimtab.pipeline import terminal as module
from trimtab.pipeline.bars import settled, without_bars
from trimtab.pipeline.terminal import Terminal

BAR = "\rcapture:  34%|███▍      | 137/399 [00:34<01:06, 3950.47token/s, loss=0.3]"


@pytest.fixture
def terminal(tmp_path):
    with (
        (tmp_path / "screen").open("w+", encoding="utf-8") as screen,
        Terminal("toy", tmp_path / "toy.log", screen) as made,
    ):
        yield made


def test_bars_are_dropped_and_warnings_kept(terminal):
    assert terminal.text("stderr", BAR) == ""
    assert terminal.text("stderr", BAR + BAR + "\n") == ""
    assert terminal.text("stderr", "\n") == ""
    assert terminal.text("stderr", "\revaluate: 3chunk [00:01,  2.95chunk/s]") == ""
    assert terminal.text("stderr", "  0%|          | 0/345 [00:00<?, ?document/s]") == ""
    assert terminal.text("stderr", BAR + "UserWarning: on the bar's line\n") == "UserWarning: on the bar's line\n"
    assert terminal.text("stderr", "a line of Windows\r\n") == "a line of Windows\n"
    assert terminal.text("stderr", "UserWarning: careful\n") == "UserWarning: careful\n"
    assert terminal.text("stdout", "a\n\nb\n") == "a\n\nb\n"
    assert terminal.text("stdout", "50%|half| of the people\n") == "50%|half| of the people\n"
    assert terminal.text("stdout", "draft\rfinal\n") == "final\n"


def test_lines_without_a_terminal_are_few(terminal, tmp_path, monkeypatch):
    clock = itertools.count()
    terminal._last_quiet = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    for _ in range(100):
        terminal.text("stderr", BAR)
    terminal.console.file.flush()
    shown = (tmp_path / "screen").read_text(encoding="utf-8").splitlines()
    assert 3 <= len(shown) <= 100 / module.QUIET_EVERY + 2
    assert shown[0] == "toy: [] capture:  34% 137/399 [00:34<01:06, 3950.47token/s, loss=0.3]"


def test_a_run_outlives_its_log_and_says_so_once(terminal, tmp_path):
    terminal.log.close()
    with (
        contextlib.suppress(OSError),
        Path("/dev/full").open("w", encoding="utf-8") as terminal.log,
    ):  # closing it fails as well
        for _ in range(3):
            terminal.line("a line", shown=False)
    terminal.console.file.flush()
    assert (tmp_path / "screen").read_text(encoding="utf-8") == "toy: the log ends here: No space left on device\n"


DIAGNOSTICS = (
    "CUDA error in layer 3 [00:12 after start] illegal access",
    "at step 3/10 [00:12] loss nan",
    "ETA [1:00:12, or so] of [3] jobs 50% done",
    "50%|half| of the people",
    "Saved 3 shards [00:12, 4.2MB/s] to disk",
    "worker 3: 12 files [00:12, then nothing",
    "[12:34:56] connected | 3/4 [10:00<20:00 today]",
    "a path/to/a [00:01<00:02, file/s",
    "error: 12 faults [00:01, 3bad/s]",
    "error: 12 faults [00:01, 3faults/s]",
    "dropped: 95%|of all rows |",
    "dropped: 95%|of all rows | 3/10 [00:01<00:02,  1.00row/s]",
    "dropped: 95%|####| 3/10 of all rows",
    "WARNING: 3 samples [00:00",
    "lost: 12 [00:01,",
)


@pytest.mark.parametrize("line", DIAGNOSTICS)
def test_lines_with_times_brackets_and_per_cents_stay_whole(terminal, line):
    assert terminal.text("stderr", f"{line}\n") == f"{line}\n"
    assert terminal.text("stderr", f"{BAR}\r{line}\n") == f"{line}\n"
    assert terminal.text("stderr", f"{BAR}\n{line}\n{BAR}\n").strip() == line


KINDS = st.fixed_dictionaries(
    {},
    optional={
        "desc": st.sampled_from(["loop", "a b: c", "layer [3]", "x %", "seed 1: 50%"]),
        "unit": st.sampled_from(["token", " steps", "B", "chunk"]),
        "unit_scale": st.sampled_from([True, 7]),
        "postfix": st.sampled_from([{"loss": 0.3}, {"loss": [1, 2]}, {"loss": float("nan"), "rate": "1/3"}]),
        "ascii": st.sampled_from([True, " .oO0"]),
        "colour": st.just("green"),
        "leave": st.booleans(),
        "position": st.integers(0, 2),
        "ncols": st.sampled_from([0, 120]),
        "initial": st.integers(0, 5),
    },
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(KINDS, st.booleans(), st.sampled_from([1, 3, 50]), st.sampled_from([0, 10, 4_000, 1e6]), st.booleans())
def test_whatever_tqdm_draws_goes_and_what_is_said_beside_it_stays(kind, counted, steps, age, nested):
    file = io.StringIO()
    said = DIAGNOSTICS[steps % len(DIAGNOSTICS)]
    bar = tqdm(total=steps if counted else None, file=file, mininterval=0, miniters=1, **kind)
    bar.start_t -= age
    for step in range(steps):
        if nested:
            list(tqdm(range(2), file=file, mininterval=0, leave=False))
        if step == 1:
            bar.write(said, file=file)
        bar.update()
    bar.close()
    file.write(said + "\n")
    left = module.ANSI.sub("", settled(without_bars(file.getvalue())[0])).split("\n")
    assert [line for line in left if line.strip()] == [said] * (2 if steps > 1 else 1)


@pytest.mark.parametrize(
    "unit",
    ["a", "[", "/", "\r", "|", "|||", "0", " ", "=", "\n", "%|", "\x1b[", "\n\x1b[A", "QUJDRA/+", "\r1%|1|", 
     " [00:00, ", "| 1/2 [00:00<00:00, 1it/s", "\r1it [00:00, 1it/s][[[[", "\r12", "\r: 1%|", "\r1 [", "\r\n"],
)  # fmt: skip
def test_a_chunk_takes_time_linear_in_its_length(terminal, unit):
    def seconds(size: int) -> float:
        began = time.process_time()
        terminal.text("stderr", "\r%" + unit * (size // len(unit)))
        return time.process_time() - began

    seconds(1_000)
    once, fourfold = (min(seconds(size) for _ in range(2)) for size in (50_000, 200_000))
    assert fourfold < 9 * once + 0.2


def test_halves_of_surrogate_pairs_end_no_run(terminal, tmp_path):
    terminal.text("stderr", "half \ud800 a pair\n")
    terminal.line("half \ud800 a pair")
    assert "half \\ud800 a pair" in (tmp_path / "toy.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("columns", [20, 30, 40, 60])
def test_bars_cut_short_to_a_width_go_as_well_and_where_nothing_is_drawn_all_but_the_last(columns):
    for kind in ({}, {"desc": "loop"}, {"colour": "green"}, {"ascii": True}, {"unit": "token"}):
        drawn, counted = io.StringIO(), io.StringIO()
        list(tqdm(range(30), file=drawn, mininterval=0, ncols=columns, **kind))
        list(tqdm(iter(range(30)), file=counted, mininterval=0, ncols=columns, **kind))
        left = [module.ANSI.sub("", settled(without_bars(file.getvalue())[0])).strip() for file in (drawn, counted)]
        assert not left[0]
        assert "\n" not in left[1]
