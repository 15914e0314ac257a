"""What a policy is asked, and how its answer is judged.

`open_task` takes one string: a name out of `TASKS`, whose questions reasoning-gym generates; or a set of questions and
answers, `hub:org/name[::config]@revision` or a .jsonl or .parquet file (`trimtab.rl.question_sets`). A generated
question is in train, val or test by its text alone, so none is ever in two of them, whatever the seeds. Every reward is
0 or 1 (`trimtab.rl.verify`).
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase

from trimtab.errors import InputError
from trimtab.rl.verify import boxed, exact, last_number, scorer

SPLITS = ("train", "val", "test")
NUMBER = "Answer with a number only."
NUMBERS = "Answer with the sorted numbers only."
EXPRESSION = "Answer with an expression only."
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
"""The bias-only paper's instruction."""


def digest(text: str) -> int:
    """64 bits that depend on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


@dataclass(frozen=True)
class Item:
    """A question with what its judge needs."""

    task: str
    question: str
    answer: str
    instruction: str
    """How to answer."""
    subject: str = ""
    """What it asks about, whatever the wording: items of one subject are near relatives, always of one split, and the
    unit that intervals resample."""
    metadata: str = ""
    """reasoning-gym's own entry, as JSON, where its scorer judges."""


def split_of(subject: str) -> str:
    """The split that a subject belongs to, by its text alone: half train, a tenth val, two fifths test."""
    share = digest(subject) / 2**64
    return "test" if share < 0.4 else "val" if share < 0.5 else "train"


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Questions of one kind, in three splits, and their judge."""

    name: str
    instruction: str
    verifier: str = "exact"
    """exact | last_number | boxed | scorer: a function of `trimtab.rl.verify`."""

    def items(self, split: str, n: int, seed: int) -> list[Item]:
        """The first `n` distinct items of a split: of train, in an order that the seed draws; of val and test, in one
        that it does not touch, so that policies trained with different seeds answer the same questions.

        Raises InputError for an unknown split, and where it holds fewer than `n`.
        """
        if split not in SPLITS or n < 1:
            raise InputError(f"{self.name}: ask for one item or more of {', '.join(SPLITS)}, not {n} of {split!r}.")
        found = list(islice(self._ordered(split, str(seed) if split == "train" else "held out"), n))
        if len(found) < n:
            raise InputError(f"{self.name} has {len(found)} distinct {split} questions, not {n}: ask for fewer.")
        return found

    def reward(self, completion: str, item: Item) -> float:
        """1.0 for a right completion of the item, 0.0 for any other text. Raises InputError for a foreign item."""
        if item.task != self.name:
            raise InputError(f"{self.name} cannot judge an item of {item.task}.")
        match self.verifier:
            case "exact":
                return exact(completion, item.answer)
            case "last_number":
                return last_number(completion, item.answer)
            case "boxed":
                return boxed(completion, item.answer, item.question)
            case "scorer":
                return scorer(completion, item.metadata)
        raise InputError(f"{self.name}: a verifier is exact, last_number, boxed or scorer, not {self.verifier!r}.")

    @abstractmethod
    def _ordered(self, split: str, order: str) -> Iterator[Item]:
        """The distinct items of a split, in an order that depends on the string `order` only."""


def _as_worded(entry: Mapping[str, Any]) -> tuple[str, str]:
    return entry["question"].strip(), entry["answer"]


def _expression(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Without reasoning-gym's sentences around it: `wordings` has its own."""
    return entry["metadata"]["expression"], entry["answer"]


def _commuted(expression: str) -> str:
    """The same for 7 + 9 and 9 + 7, of which one must not be trained on where the other is held out."""
    for sign in (" + ", " * "):
        terms = expression.split(sign)
        if all(term.isdigit() for term in terms):
            return sign.join(sorted(terms, key=int))
    return expression


def _sorting(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Whole numbers as such, and a plain list for an answer: reasoning-gym has 16.0 and asks for quoted strings."""
    given, wanted = (
        ", ".join(f"{float(number):.0f}" for number in entry["metadata"][key])
        for key in ("original_numbers", "sorted_numbers")
    )
    return f"Sort in {entry['metadata']['direction']} order: {given}", wanted


@dataclass(frozen=True, kw_only=True)
class GeneratedTask(Task):
    """A generator of reasoning-gym.

    Its item i depends on seed + i, so data sets with near seeds overlap: here seeds are digests, far from one another.
    """

    generator: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    plain: Callable[[Mapping[str, Any]], tuple[str, str]] = _as_worded
    """(subject, answer) of an entry."""
    related: Callable[[str], str] = str
    """What a subject shares with its near relatives: it decides the split, and is the `subject` of the items."""
    wordings: tuple[str, ...] = ("{}",)
    """Ways to ask about a subject: a question each."""

    chunk = 10_000
    patience = 10
    """Draws without a new question, for each one known, after which there are no more. A question twice as rare as the
    mean is then missed once in 150 times."""

    def _ordered(self, split: str, order: str) -> Iterator[Item]:
        import reasoning_gym

        seen: set[str] = set()
        idle = 0
        for chunk in count():
            seed = digest(f"{self.name}/{order}/{chunk}")
            entries = reasoning_gym.create_dataset(self.generator, seed=seed, size=self.chunk, **self.settings)
            for i in range(self.chunk):
                entry = entries[i]
                subject, answer = self.plain(entry)
                if subject in seen:
                    idle += 1
                    if idle > self.patience * (len(seen) + 50):
                        return
                    continue
                idle = 0
                seen.add(subject)
                group = self.related(subject)
                if split_of(group) == split:
                    metadata = json.dumps(entry) if self.verifier == "scorer" else ""
                    for wording in self.wordings:
                        question = wording.format(subject)
                        yield Item(self.name, question, answer, self.instruction, group, metadata)


def _terms(fewest: int, most: int, digits: int) -> dict[str, int]:
    return {"min_terms": fewest, "max_terms": most, "min_digits": digits, "max_digits": digits}


_WAYS = (
    "What is {}?", "Calculate {}.", "{} =", "How much is {}?", "Please work out {}.", "Compute {}", "Tell me {}.",
    "Find the value of {}.",
)  # fmt: skip
_SUM: dict[str, Any] = {
    "instruction": NUMBER, "generator": "chain_sum", "plain": _expression, "verifier": "last_number",
    "related": _commuted,
}  # fmt: skip
_THREE = {"min_numbers": 3, "max_numbers": 3, "max_decimals": 0, "min_value": 0, "max_value": 20}
_GENERATED = (
    GeneratedTask(name="sum", settings=_terms(2, 2, digits=1), wordings=_WAYS, **_SUM),
    GeneratedTask(name="sum-3terms", settings=_terms(3, 3, digits=1), wordings=_WAYS[:1], **_SUM),
    GeneratedTask(name="sum-2digit", settings=_terms(2, 2, digits=2), wordings=_WAYS[:1], **_SUM),
    GeneratedTask(
        name="product",
        instruction=NUMBER,
        generator="products",
        plain=_expression,
        related=_commuted,
        verifier="last_number",
        settings=_terms(2, 2, digits=1),
        wordings=_WAYS[:1],
    ),
    GeneratedTask(name="sorting", instruction=NUMBERS, generator="number_sorting", plain=_sorting, settings=_THREE),
    GeneratedTask(name="gcd", instruction=NUMBER, generator="gcd", verifier="last_number"),
    GeneratedTask(name="gsm_symbolic", instruction=BOXED, generator="gsm_symbolic", verifier="boxed"),
    GeneratedTask(name="countdown", instruction=EXPRESSION, generator="countdown", verifier="scorer"),
)
TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _GENERATED})
"""`sum` has 200 subjects, each worded in eight ways; `sum-3terms` and `sum-2digit` share none of them: they measure
what carries over. `product` has 100, some 40 of them for test. `gcd` is a diagnosis: a policy that always says 2
is right on three questions in ten."""


def open_task(spec: str) -> Task:
    """The task that a string names; nothing is read yet. Raises InputError for a string that names none."""
    from trimtab.rl.question_sets import open_question_set  # which builds on this module

    if spec in TASKS:
        return TASKS[spec]
    if spec.startswith("hub:") or (Path(spec).suffix in (".jsonl", ".parquet") and Path(spec).is_file()):
        return open_question_set(spec)
    raise InputError(
        f"{spec!r} is not a task: give {', '.join(TASKS)}, hub:org/name@revision, or an existing .jsonl or .parquet "
        "file with columns `question` and `answer`."
    )


def chat_prompt(tokenizer: PreTrainedTokenizerBase, item: Item) -> list[int]:
    """Token ids up to where the answer begins: the chat template's, or a plain frame where the tokenizer has none.

    The instruction follows the question, as in the bias-only paper: as a system message small models overlook it.
    """
    if tokenizer.chat_template is None:
        frame = f"{item.instruction}\n\nQuestion: {item.question}\nAnswer:"
        return list(tokenizer(frame)["input_ids"])
    messages = [{"role": "user", "content": f"{item.question} {item.instruction}"}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
