"""Verifiers say right or wrong and nothing between; nothing a policy writes raises, hangs or fills the memory."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.rl import verify
from trimtab.rl.numerals import numeral
from trimtab.rl.verify import GUARD, boxed, exact, last_box, last_number, scorer

from .judged import BOXED, LAST_NUMBER

HANG_S = 60
"""Far more than a hostile completion may cost, on a machine however busy."""


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(verify, "TIMEOUT_S", 1.0)


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("9", "9", 1), (" 9\n", "9", 1), ("9.", "9", 1), ("+9", "9", 1), ("09", "9", 1), ("-0", "0", 1),
        ("-9", "-9", 1), ("- 9", "-9", 0), ("−9", "-9", 0), ("-9", "9", 0), ("9.0", "9", 0), ("9..", "9", 0),
        ("", "9", 0), (".", "9", 0),
        ("4 + 5 = 9", "9", 0), ("The answer is 9.", "9", 0), ("9 9", "9", 0), ("9, 9", "9", 0), ("nine", "9", 0),
        ("9!", "9", 0), ("9\n10", "9", 0), ("0 1 2 3 4 5 6 7 8 9", "9", 0), ("1,000", "1000", 0), ("٩", "9", 0),
        ("3, 7, 12", "3, 7, 12", 1), ("3,7,12.", "3, 7, 12", 1), ("3, 7, 12, 13", "3, 7, 12", 0),
        ("7, 3, 12", "3, 7, 12", 0), ("[3, 7, 12]", "3, 7, 12", 0), ("3 7 12", "3, 7, 12", 0), ("3, 7", "3, 7, 12", 0),
        ("Paris.", "Paris", 1), ("paris", "Paris", 0), ("1/2", "1/2", 1), ("0.5", "1/2", 0),
        ("9" * 400, "9" * 400, 1), ("9" * 1_000, "9" * 1_000, 0),
    ],
)  # fmt: skip
def test_exact(completion, answer, expected):
    assert exact(completion, answer) == expected


@pytest.mark.parametrize(("completion", "answer", "expected"), LAST_NUMBER)
def test_last_number(completion, answer, expected):
    assert last_number(completion, answer) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{5}", "5"), (r"\boxed{6} or \boxed{ 5 } .", "5"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), (r"\boxed{\}}", r"\}"), (r"\boxed{\boxed{5}}", "5"), (r"\boxed{}", ""),
        (r"\boxed{5} and \boxed{6", None), (r"\boxed{5\}", None),
        (r"\boxed {5}", "5"), (r"\boxed 5", "5"), ("\\boxed\n{5}", "5"), (r"\fbox{5}", "5"), (r"\boxed 5.", "5"),
        (r"$\boxed{5}$", "5"), (r"\boxed5", "5"), (r"$\boxed 5$", "5"), (r"\boxed{5", None), (r"\boxed", None),
        ("5", None), ("", None),
        (r"\boxed{" + "5" * 500 + "}", "5" * 500), (r"\boxed{" + "5" * 501 + "}", None),
    ],
)  # fmt: skip
def test_the_last_box(text, expected):
    assert last_box(text) == expected


@pytest.mark.parametrize(("box", "answer", "expected"), BOXED)
def test_boxed(box, answer, expected):
    assert boxed(f"So it must be\n\\boxed{{{box}}}. Done.", answer) == expected


@pytest.mark.parametrize(
    ("one", "other", "expected"), [pair for pair in BOXED if numeral(pair[0]) and numeral(pair[1])]
)
def test_numbers_are_compared_alike_both_ways_round(one, other, expected):
    assert boxed(f"\\boxed{{{other}}}", one) == expected


@pytest.mark.parametrize(
    ("box", "answer", "question", "expected"),
    [
        ("(x+1)^2", "x^2+2x+1", "Expand $(x + 1)^2$.", 0), ("x^2+2x+1", "x^2+2x+1", "Expand $(x + 1)^2$.", 1),
        (r"\sqrt{18}", r"3\sqrt{2}", r"Simplify $\sqrt{18}$.", 0),
        (r"3\sqrt2", r"3\sqrt{2}", r"Simplify $\sqrt{18}$.", 1),
        ("7+9", "16", "What is 7+9?", 0), ("16", "16", "What is 7+9?", 1), ("x", "x", "What is x?", 1),
        ("x+1", "x+1", "Which is larger, x+1 or x?", 1), (r"\frac{x}{2}", r"\frac{x}{2}", "Halve x.", 1),
    ],
)  # fmt: skip
def test_a_copy_of_the_question_earns_nothing_unless_it_is_the_answer(box, answer, question, expected):
    assert boxed(f"\\boxed{{{box}}}", answer, question) == expected


def test_boxed_wants_a_box_and_takes_the_last():
    assert boxed("5", "5") == 0
    assert boxed(r"\boxed{5}, no, \boxed{6}", "5") == 0
    assert boxed(r"\boxed{6}, no, \boxed{5}", "5") == 1


COUNTDOWN = json.dumps(
    {
        "question": "Make 20 out of 2, 3, 4, 5.",
        "answer": "(2 + 3) * 4 - 5 + 5",
        "metadata": {"source_dataset": "countdown", "numbers": [2, 3, 5], "target": 25},
    }
)


SCORED = [
    ("(2 + 3) * 5", 1), (" 5*(3+2)\n", 1), ("5 * 3 + 5 * 2", 0), ("25", 0), ("5 * 5", 0), ("2 + 3 + 5", 0),
    ("(2 + 3) * 5 = 25", 0), ("(2 + 3) * 5.", 0), ("5 ** 2 + 3 - 3", 0), ("5 * (3 + 2", 0), ("", 0),
    ("5 / (2 - 2)", 0),
    ("2 3 5", 0), ("(lambda: 25)() + 0*(2+3+5)", 0), ("(2 + 3) * 5 # right", 0), ("5 // 2 + 3", 0),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "expected"), SCORED)
def test_the_scorer_counts_only_what_is_fully_right(completion, expected):
    assert scorer(completion, COUNTDOWN) == expected


def test_what_a_worker_computes_is_the_same_in_this_process(monkeypatch):
    monkeypatch.setattr(GUARD, "run", lambda check, *args: float(verify._attempt(check, args)))
    for box, answer, expected in BOXED:
        assert boxed(f"\\boxed{{{box}}}", answer) == expected, (box, answer)
    for completion, expected in SCORED:
        assert scorer(completion, COUNTDOWN) == expected, completion


def test_the_scorer_never_runs_code(tmp_path):
    """reasoning-gym hands the answer to sympy's parse_expr, which is Python's eval."""
    assert scorer(f"__import__('pathlib').Path('{tmp_path}/made').touch() or 25", COUNTDOWN) == 0
    assert not (tmp_path / "made").exists()


HOSTILE = {
    "ten million digits": "9" * 10_000_000,
    "ten million blanks": " " * 10_000_000,
    "ten million brackets": "(" * 10_000_000,
    "boxes in boxes": r"\boxed{" * 100_000 + "5" + "}" * 100_000,
    "an unclosed box": r"\boxed{" + "{" * 190_000,
    "signs": "-" * 190_000,
    "groups of digits": "1" + ",111" * 40_000 + "1",
    "dots": "1." * 90_000,
    "a tower of powers": r"\boxed{10^{10^{10^{10}}}}",
    "a tower in Python": r"\boxed{10**10**10**10}",
    "a factorial": r"\boxed{999999999!}",
    "deep braces": r"\boxed{" + "{" * 240 + "5" + "}" * 240 + "}",
    "deep brackets": r"\boxed{" + "(" * 240 + "5" + ")" * 240 + "}",
    "deep roots": r"\boxed{" + r"\sqrt{" * 70 + "5" + "}" * 70 + "}",
    "a huge sum": r"\boxed{\sum_{n=1}^{10^9} \frac{\sin n}{n^n}}",
    "an integral": r"\boxed{\int_0^1 \int_0^1 \int_0^1 x^{y^{z^{x^y}}} dx dy dz}",
    "every answer": r"\boxed{" + ", ".join(map(str, range(100))) + "}",
    "every answer, in dollars": r"\boxed{" + " or ".join(f"${i}$" for i in range(60)) + "}",
    "food for regexes": r"\boxed{" + "$" * 100 + r"\boxed" * 30 + "a " * 100 + "!" + "}",
    "brackets alone": "(" * 400,
    "a long product": "*".join(["99999"] * 80),
    "a division by nothing": "1/0",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_completion_is_wrong_and_costs_little(name, impatient):
    started = time.monotonic()
    assert exact(HOSTILE[name], "5") == 0
    assert last_number(HOSTILE[name], "123") == 0
    assert boxed(HOSTILE[name], r"\frac{5}{7}") == 0
    assert scorer(HOSTILE[name], COUNTDOWN) == 0
    assert time.monotonic() - started < HANG_S


class TestGuard:
    def test_it_kills_what_takes_too_long_and_goes_on(self, impatient):
        started, before = time.monotonic(), GUARD.cut_short
        assert GUARD.run(time.sleep, 10 * HANG_S) == 0
        assert time.monotonic() - started < HANG_S
        assert GUARD.cut_short == before + 1
        assert GUARD.run(int, "1") == 1

    def test_memory_is_limited(self):
        assert GUARD.run(bytearray, 2 * verify.MEMORY_BYTES) == 0
        assert GUARD.run(bytearray, verify.MEMORY_BYTES // 4) == 1

    def test_a_crash_counts_as_wrong_and_poisons_nothing(self):
        assert GUARD.run(os._exit, 3) == 0
        assert GUARD.run(os.abort) == 0
        assert GUARD.run(int, "1") == 1

    def test_an_exception_counts_as_wrong(self):
        assert GUARD.run(int, "one") == 0

    def test_threads_may_share_it(self):
        GUARD.close()
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(lambda i: GUARD.run(int, str(i % 2)), range(100))) == [0, 1] * 50

    def test_a_worker_killed_from_outside_is_replaced(self):
        GUARD.run(int, "1")
        for child in multiprocessing.active_children():
            if child.name == "pebble_pool_worker":
                os.kill(child.pid, signal.SIGKILL)
                child.join(HANG_S)
        assert boxed(r"\boxed{0.5}", r"\frac{1}{2}") == 1

    def test_closing_leaves_no_process_and_the_next_check_starts_anew(self):
        GUARD.run(int, "1")
        GUARD.close()
        assert not [child for child in multiprocessing.active_children() if child.name == "pebble_pool_worker"]
        assert GUARD.run(int, "1") == 1

    def test_a_worker_that_does_not_start_is_no_wrong_answer(self, tmp_path):
        """A script without a main guard is run again by its own worker."""
        script = tmp_path / "script.py"
        script.write_text(
            "from trimtab.rl.verify import boxed\nprint(boxed(r'\\boxed{2x}', 'x+x'))\n", encoding="utf-8"
        )
        done = subprocess.run(
            [sys.executable, script], capture_output=True, encoding="utf-8", check=False, timeout=5 * HANG_S
        )
        assert done.returncode != 0
        assert "does not start: in a script, keep what runs under" in done.stderr

    def test_a_worker_imports_no_torch(self):
        code = "import sys, trimtab.rl.verify; sys.exit('torch' in sys.modules or 'sympy' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@settings(max_examples=500, deadline=None)
@given(st.text(), st.text(min_size=1))
def test_no_text_raises_or_earns_a_fraction(completion, answer):
    for verifier in (exact, last_number):
        assert verifier(completion, answer) in (0.0, 1.0)
    assert last_box(completion) is None or "box" in completion


PIECES = [
    "{",
    "}",
    r"\frac",
    r"\sqrt",
    r"\text",
    r"\boxed{",
    r"\left(",
    r"\begin{cases}",
    "\\",
    "$",
    "%",
    "&",
    "=",
    "<",
]
LATEX = st.lists(st.one_of(st.sampled_from([*PIECES, *"0123456789+-*/(),. xi"]), st.characters()), max_size=12)


@settings(max_examples=60, deadline=None)
@given(LATEX)
def test_no_box_raises_or_earns_a_fraction(pieces):
    assert boxed(f"\\boxed{{{''.join(pieces)}}}", r"\frac{5}{7}") in (0.0, 1.0)


@settings(max_examples=60, deadline=None)
@given(st.text("235+-*/() ", max_size=20))
def test_no_expression_raises_or_earns_a_fraction(text):
    assert scorer(text, COUNTDOWN) in (0.0, 1.0)
