"""Progress bars are shown and not kept; everything else is kept."""

import contextlib
import itertools
from pathlib import Path

import pytest

from trimtab.pipeline import terminal as module
from trimtab.pipeline.terminal import Terminal

BAR = "\rcapture:  34%|███▍      | 137/399 [00:34<01:06, 3950.47token/s, loss=0.3]"


@pytest.fixture
def terminal(tmp_path):
    with (tmp_path / "screen").open("w+") as screen, Terminal("toy", tmp_path / "toy.log", screen) as made:
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
    shown = (tmp_path / "screen").read_text().splitlines()
    assert 3 <= len(shown) <= 100 / module.QUIET_EVERY + 2
    assert shown[0] == "toy: [] capture:  34% 137/399 [00:34<01:06, 3950.47token/s, loss=0.3]"


def test_a_run_outlives_its_log_and_says_so_once(terminal, tmp_path):
    terminal.log.close()
    with contextlib.suppress(OSError), Path("/dev/full").open("w") as terminal.log:  # closing it fails as well
        for _ in range(3):
            terminal.line("a line", shown=False)
    terminal.console.file.flush()
    assert (tmp_path / "screen").read_text() == "toy: the log ends here: No space left on device\n"
