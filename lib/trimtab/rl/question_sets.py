"""Sets of questions and answers, from a hub or a local file, as tasks."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trimtab.errors import InputError
from trimtab.pretrained import hub_trouble
from trimtab.rl.tasks import BOXED, SPLITS, Item, Task, digest, split_of
from trimtab.rl.verify import last_box
from trimtab.rows import cell, kind, read_rows

SPELLINGS = {"validation": "val", "valid": "val", "dev": "val"}
"""How sets call their splits."""


@dataclass(frozen=True, kw_only=True)
class QuestionSet(Task):
    """Questions and answers in two columns, judged by `boxed` unless `verifier` says otherwise.

    A set of two splits or more keeps them (a file has them in a column `split`), and one without val gives up a tenth
    of its train. Of any other set `only` names the one purpose, or else `split_of` shares it out. A question that
    stands in two splits counts for test, or else for val. Rows without question or answer are left out.
    """

    source: str
    question: str = "question"
    """Column of the questions."""
    answer: str = "answer"
    """Column of the answers: what follows ####, or else stands in the last box, or else all of it."""
    configs: tuple[str | None, ...] = (None,)
    """Configurations that make up the set, where the source names none."""
    only: str | None = None
    """The split that every row belongs to."""
    instruction: str = BOXED
    verifier: str = "boxed"

    def _ordered(self, split: str, order: str) -> Iterator[Item]:
        rows = list(_hub_rows(self.source, self.configs) if self.source.startswith("hub:") else _file_rows(self.source))
        own = {label for _, label, _ in rows} & set(SPLITS)
        shared: dict[str, dict[str, str]] = {name: {} for name in SPLITS}
        for place, label, row in rows:
            question, answer = self._cells(place, row)
            where = self._split(question, label, own)
            if question and answer and where in shared:
                shared[where][question] = answer
        later = [shared[name] for name in SPLITS[SPLITS.index(split) + 1 :]]
        mine = [question for question in shared[split] if not any(question in other for other in later)]
        for question in sorted(mine, key=lambda text: digest(f"{order}/{text}")):
            yield Item(self.name, question, shared[split][question], self.instruction)

    def _cells(self, place: str, row: dict[str, Any]) -> tuple[str, str]:
        where = f"{self.source}: {place}"
        question, answer = (cell(row, column, where) for column in (self.question, self.answer))
        if not isinstance(question, str | None):
            raise InputError(f"{where} has a `{self.question}` that is {kind(question)}, where a string should stand.")
        parts = answer if isinstance(answer, list) else [answer]
        if wrong := [part for part in parts if isinstance(part, dict | list | bytes)]:
            found = f"{kind(wrong[0])}{' in a list' if parts is answer else ''}"
            raise InputError(
                f"{where} has an `{self.answer}` that is {found}, where a string or a number should stand."
            )
        return (question or "").strip(), _gold(parts)

    def _split(self, question: str, label: str, own: set[str]) -> str:
        if self.only is None and len(own) < 2:
            return split_of(question)
        where = self.only or label
        return "val" if where == "train" and "val" not in own and split_of(question) == "val" else where


QUESTION_SETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "agentica-org/DeepScaleR-Preview-Dataset": {"question": "problem", "only": "train"},
        "openai/gsm8k": {"configs": ("main",)},
        "HuggingFaceH4/MATH-500": {"question": "problem", "only": "test"},
        "Maxwell-Jia/AIME_2024": {"question": "Problem", "answer": "Answer", "only": "test"},
        "opencompass/AIME2025": {"configs": ("AIME2025-I", "AIME2025-II"), "only": "test"},
        "knoveleng/AMC-23": {"question": "problem", "only": "test"},
        "knoveleng/Minerva-Math": {"question": "problem", "answer": "solution", "only": "test"},
        "knoveleng/OlympiadBench": {"only": "test"},
    }
)
"""What the bias-only paper trains and evaluates on: fields of `QuestionSet`, the columns as its code reads them."""


def open_question_set(source: str) -> QuestionSet:
    """The set that a source names, with the fields of `QUESTION_SETS` where it is one of them; nothing is read yet."""
    known = QUESTION_SETS.get(_hub_parts(source)[0], {}) if source.startswith("hub:") else {}
    return QuestionSet(name=source, source=source, **known)


def _gold(parts: list[Any]) -> str:
    text = ", ".join("" if part is None else str(part) for part in parts).rsplit("####", 1)[-1].strip()
    return last_box(text) or text


def _hub_parts(source: str) -> tuple[str, str | None, str]:
    """(repository, configuration or nothing, revision)"""
    match = re.fullmatch(r"hub:([^@:]+)(?:::([^@]+))?@([\w./-]+)", source)
    if not match:
        raise InputError(f"{source!r} is not a hub source: write hub:org/name@revision, or ::config before the @.")
    return match[1], match[2], match[3]


def _hub_rows(source: str, configs: tuple[str | None, ...]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(place, split, row) of every row of a set of the hub."""
    import datasets

    path, config, revision = _hub_parts(source)
    for each in (config,) if config else configs:
        try:
            for label, rows in datasets.load_dataset(path, each, revision=revision).items():
                name = str(label)
                found = [(f"row {i} of {name}", SPELLINGS.get(name, name), row) for i, row in enumerate(rows, start=1)]
                yield from found
        except Exception as error:  # of a network, a repository and a file format, none of which is ours
            raise hub_trouble(source, error) from error


def _file_rows(source: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(place, split or nothing, row) of every row of a .jsonl or .parquet file."""
    for place, row in read_rows(Path(source)):
        label = str(row.get("split") or "")
        yield place, SPELLINGS.get(label, label), row
