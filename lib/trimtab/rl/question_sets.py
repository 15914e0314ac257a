"""Sets of questions and answers, from a hub or a local file, as tasks."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import polars as pl

from trimtab.errors import InputError
from trimtab.rl.tasks import BOXED, SPLITS, Item, Task, digest, split_of
from trimtab.rl.verify import last_box

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
        own = {label for label, _ in rows} & set(SPLITS)
        shared: dict[str, dict[str, str]] = {name: {} for name in SPLITS}
        for index, (label, row) in enumerate(rows):
            question, answer = self._cells(index, row)
            where = self._split(question, label, own)
            if question and answer and where in shared:
                shared[where][question] = answer
        later = [shared[name] for name in SPLITS[SPLITS.index(split) + 1 :]]
        mine = [question for question in shared[split] if not any(question in other for other in later)]
        for question in sorted(mine, key=lambda text: digest(f"{order}/{text}")):
            yield Item(self.name, question, shared[split][question], self.instruction)

    def _cells(self, index: int, row: Mapping[str, Any]) -> tuple[str, str]:
        for column in (self.question, self.answer):
            if column not in row:
                has = ", ".join(sorted(row))
                raise InputError(f"{self.source}: row {index} has no column `{column}`; it has {has}.")
        return str(row[self.question] or "").strip(), _gold(row[self.answer])

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


def _gold(cell: Any) -> str:
    parts = cell if isinstance(cell, list) else [cell]
    text = ", ".join("" if part is None else str(part) for part in parts).rsplit("####", 1)[-1].strip()
    return last_box(text) or text


def _hub_parts(source: str) -> tuple[str, str | None, str]:
    """(repository, configuration or nothing, revision)"""
    match = re.fullmatch(r"hub:([^@:]+)(?:::([^@]+))?@([\w./-]+)", source)
    if not match:
        raise InputError(f"{source!r} is not a hub source: write hub:org/name@revision, or ::config before the @.")
    return match[1], match[2], match[3]


def _hub_rows(source: str, configs: tuple[str | None, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(split, row) of every row of a set of the hub."""
    import datasets

    path, config, revision = _hub_parts(source)
    for each in (config,) if config else configs:
        try:
            loaded = datasets.load_dataset(path, each, revision=revision)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise InputError(f"Cannot read {source}: {str(error).strip().splitlines()[0]}") from error
        for label, rows in loaded.items():
            for row in rows:
                yield SPELLINGS.get(str(label), str(label)), row


def _file_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(split or nothing, row) of every row of a .jsonl or .parquet file."""
    try:
        if Path(source).suffix == ".parquet":
            rows = pl.read_parquet(source).to_dicts()
        else:
            rows = [json.loads(line) for line in Path(source).read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        raise InputError(f"Cannot read {source}: {str(error).strip().splitlines()[0]}") from error
    for row in rows:
        label = str(row.get("split") or "")
        yield SPELLINGS.get(label, label), row
