"""Strict verifiers: a completion is right, 1.0, or it is not, 0.0; there is no partial credit to collect.

    exact        the whole completion is the answer: an integer, or a list of them, or a word
    boxed        the last \\boxed{} of the completion equals the answer, in value
    scorer       an arithmetic expression that reasoning-gym's own scorer takes for fully right (many answers are)
  last_number  the completion ends on the answer: what stands last decides, as with the last box

A policy is an adversary that samples until something pays, so no completion may raise, hang or fill the memory. Caps
on length come first; `exact` and `last_number` are then linear in what is left. Whatever reaches a parser does so in a
`Guard`: another process, with a limit on time and memory.

Keep this module light: a guard's worker imports it, and with it `trimtab.rl`, each time that it starts.
"""

import atexit
import contextlib
import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from pebble import ProcessExpired, ProcessPool

from trimtab.rl.numerals import SIGNS, numbers, numeral

MAX_COMPLETION = 200_000
"""Characters of a completion that are read at all; about 50,000 tokens."""
MAX_ANSWER = 500
"""Characters of an answer, once it has been found."""
TIMEOUT_S = 5.0
"""Seconds that a worker may think about one answer; a usual one takes milliseconds."""
MEMORY_BYTES = 1 << 30
"""What a worker may allocate beyond its imports."""
START_S = 120.0
"""Seconds that a worker may take to start, on a busy machine."""

BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*(\{|(?=[-+0-9A-Za-z\\$(\[]))")
INTEGER = re.compile(r"([+-]?)0*([0-9]+)")
SYMBOL = re.compile(r"\\?[A-Za-z]+(?:_\{?[A-Za-z0-9]+\}?)?'*(?:\([a-z]\))?|\\text\{[^{}=]*\}")
EQUALS = re.compile(r"(?<![<>!:=\\])=(?![=<>])")
ARITHMETIC = re.compile(r"[0-9+\-*/() ]+")


def exact(completion: str, answer: str) -> float:
    """1.0 where the stripped completion, less at most one final period, equals the answer.

    Both are split at commas, so a comma never groups thousands, and each part is stripped. A part that is an optional
    sign and digits counts as an integer: +5 and 05 are 5. Nothing else is converted: 5.0, five and 4 + 5 = 9 are not
    integers, and other parts must be equal letter for letter.
    """
    if len(completion) > MAX_COMPLETION:
        return 0.0
    given = completion.strip()
    return float(0 < len(given) <= MAX_ANSWER and _parts(given) == _parts(answer.strip()))


def last_number(completion: str, answer: str) -> float:
    """1.0 where the last number of the completion equals the answer; for a list of k numbers, the last k.

    As strict as the last box: a list of guesses earns nothing but by its last. 5.0, 1,234 and -5 with any dash or a
    blank after it are read as numbers, and anything may come before them; what has still to be worked out, such as
    8 - 4, 2^4 or a copy of the question, is none (`numerals.numbers`).
    """
    fractions = "/" in answer or "frac" in answer
    wanted = numbers(answer, fractions=fractions)
    if not wanted or None in wanted:
        return 0.0
    return float(numbers(completion[-2 * MAX_ANSWER :], fractions=fractions)[-len(wanted) :] == wanted)


def last_box(text: str) -> str | None:
    r"""What the last \boxed{...} holds, braces balanced, or nothing where it never closes or is too long.

    Escaped braces, \{ and \}, are text. An earlier box does not stand in for a broken last one. Written without
    braces, \boxed 5, it holds what follows up to a blank; \fbox and \framebox are boxes too.
    """
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None
    body = text[boxes[-1].end() :][: MAX_ANSWER + 1]
    if not boxes[-1][1]:
        return re.split(r"[\s$]|[.,;:!?]+(?=\s|$)", body)[0]
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", body, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return body[: brace.start()].strip()
    return None


def boxed(completion: str, answer: str, question: str = "") -> float:
    r"""1.0 where the last box of the completion is equal in value to the answer, a piece of LaTeX.

    As in Bias-Only Adaptation 1/2, 0.5 and x = 1/2 all answer 1/2. Unlike there, the answer must have been worked out:
    where it is a number so must be what the box holds, to the last digit (`numerals.numeral`), and 7+9 is none for 16.
    Other answers are compared as math_verify understands mathematics; then an expression that stands in the question
    earns nothing. Every side of an equation must be equal to the answer, or a name for it.
    """
    found = last_box(completion) if len(completion) <= MAX_COMPLETION else None
    if not found or len(answer) > MAX_ANSWER:
        return 0.0
    gold = numeral(answer)
    *names, given = [found] if EQUALS.search(answer) else EQUALS.split(found)
    others = [side for name in names if not SYMBOL.fullmatch(side := name.strip(" $"))]
    if gold is not None:
        value = numeral(given)
        right = value is not None and value.equals(gold)
    elif _squeezed(given) == _squeezed(answer):
        right = True
    else:
        right = not _copied(given, question) and bool(GUARD.run(_equal, answer, given))
    return float(right and all(GUARD.run(_equal, answer, side) for side in others))


def _squeezed(text: str) -> str:
    return re.sub(r"\s|\\[,;:! ]|\\left|\\right|[$*{}]|\\cdot|\\times", "", text.translate(SIGNS)).removesuffix(".")


def _copied(given: str, question: str) -> bool:
    """Whether it is an expression out of the question."""
    text = _squeezed(given)
    return bool(re.search(r"[-+/^(]|\\[a-z]", text)) and text in _squeezed(question)


def scorer(completion: str, entry: str) -> float:
    """1.0 where reasoning-gym's scorer gives the stripped completion exactly 1.0; `entry`: its item, as JSON.

    The scorers evaluate what they are given, as Python does, so only digits, blanks and + - * / ( ) come that far;
    powers, which can ask for any amount of memory, do not.
    """
    if len(completion) > MAX_COMPLETION:
        return 0.0
    given = completion.strip()
    if len(given) > MAX_ANSWER or not ARITHMETIC.fullmatch(given) or "**" in given or "//" in given:
        return 0.0
    return GUARD.run(_scored, given, entry)


class Guard:
    """Runs checks in worker processes that are killed when they take too long, and replaced when they die.

    Workers are spawned at the first check and end with this process. Safe to use from several threads: `WORKERS`
    checks run at once.
    """

    WORKERS = max(1, min(4, (os.cpu_count() or 1) // 2))

    def __init__(self) -> None:
        self.cut_short = 0
        """Checks that came to no end of their own. Many of them mean a hostile policy, or a machine too busy."""
        self._pool: ProcessPool | None = None
        self._lock = threading.Lock()

    def run(self, check: Callable[..., Any], *args: Any) -> float:
        """1.0 where `check(*args)` is true; 0.0 where it is not, raises, or is cut short.

        Raises RuntimeError where no worker starts: that is no completion's doing.
        """
        for _ in range(2):
            try:
                task = self._running().schedule(_attempt, args=(check, args), timeout=TIMEOUT_S)
                return float(task.result())
            except (TimeoutError, ProcessExpired, MemoryError):
                self.cut_short += 1
                return 0.0
            except BrokenProcessPool:  # an idle worker was killed from outside; a new pool will do
                continue
        raise RuntimeError("The processes that verify answers keep dying: is the machine out of memory?")

    def close(self) -> None:
        """End the workers; the next check starts new ones."""
        with self._lock:
            if self._pool is not None:
                self._pool.stop()
                self._pool.join()
                self._pool = None

    def _running(self) -> ProcessPool:
        with self._lock:
            if self._pool is not None and not self._pool.active:
                self._pool.stop()
                self._pool.join()
                self._pool = None
            if self._pool is None:
                self._pool = _started_pool(self.WORKERS)
            return self._pool


def _started_pool(workers: int) -> ProcessPool:
    """A pool that has got an easy answer right: otherwise a broken installation would look like a hopeless policy."""
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's threads
    pool = ProcessPool(workers, max_tasks=10_000, initializer=_prepare, context=spawn)  # sympy's caches grow
    try:
        ready = pool.schedule(_attempt, args=(_equal, (r"\frac{1}{2}", "0.5"))).result(START_S)
    except (TimeoutError, BrokenProcessPool):
        ready = False
    if not ready:
        pool.stop()
        pool.join()
        raise RuntimeError(
            "The process that verifies answers does not start: in a script, keep what runs under "
            '`if __name__ == "__main__":`, and check that math_verify and reasoning_gym import.'
        )
    return pool


GUARD = Guard()
atexit.register(GUARD.close)


def _prepare() -> None:
    """In a worker: import what takes seconds, before any clock ticks, then limit the memory."""
    import logging
    import resource

    import math_verify  # type: ignore[import-untyped]  # noqa: F401
    import psutil
    import reasoning_gym  # noqa: F401

    # A handler in Python would wait for a sum in C to end; the default action does not.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no time limit of its own
    limit = psutil.Process().memory_info().vms + MEMORY_BYTES
    with contextlib.suppress(ValueError, OSError):  # macOS takes no such limit
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _attempt(check: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    try:
        return bool(check(*args))
    except Exception:
        return False


def _equal(gold: str, found: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    latex = [LatexExtractionConfig(boxed_match_priority=0)]
    # Its own time limits are alarms, which the guard makes needless.
    sides = [parse(f"\\boxed{{{_latex(text)}}}", latex, parsing_timeout=None) for text in (gold, found)]
    return verify(*sides, float_rounding=12, timeout_seconds=None)  # not symmetric: gold comes first


def _latex(text: str) -> str:
    """Plain notation in LaTeX's: x**2, pi/2, sqrt(2)."""
    text = re.sub(r"(?<![\\A-Za-z])(pi|infty|theta|alpha|beta)(?![A-Za-z])", r"\\\1 ", text.translate(SIGNS))
    text = re.sub(r"\\?sqrt\s*(?:\(([^()]*)\)|([0-9]+|[a-z]))", lambda m: rf"\sqrt{{{m[1] or m[2]}}}", text)
    return re.sub(r"\*\*\s*(-?\w+)", r"^{\1}", text)


def _scored(given: str, entry: str) -> bool:
    import reasoning_gym

    item = json.loads(entry)
    score: Callable[[str, dict[str, Any]], float]
    score = reasoning_gym.get_score_answer_fn(item["metadata"]["source_dataset"])
    return score(given, item) == 1.0


def _parts(text: str) -> list[str]:
    """The comma-separated parts of an answer in one spelling."""
    parts = []
    for part in text.removesuffix(".").split(","):
        integer = INTEGER.fullmatch(part.strip())
        if integer:
            sign, digits = integer.groups()
            parts.append(f"{'-' if sign == '-' and digits != '0' else ''}{digits}")
        else:
            parts.append(part.strip())
    return parts
