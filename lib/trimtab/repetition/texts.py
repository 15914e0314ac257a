"""What is continued and read: prefixes, blocks and long rows from the corpus, by domain, each with its group."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Int
from torch import Tensor

from trimtab.corpus import read_blocks
from trimtab.errors import InputError
from trimtab.files import read_parquet


@dataclass(frozen=True)
class Passages:
    """Token ids of one length, and where they are from."""

    tokens: Int[Tensor, "texts seq"]
    group: list[str]
    """Documents of one group are near relatives: the unit that is resampled."""
    document: list[str]
    """Its name."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, chosen: slice) -> "Passages":
        return Passages(self.tokens[chosen], self.group[chosen], self.document[chosen])


class Library:
    """The corpus of stage `corpus`, by split and domain (the kind of a source, as `wikipedia` or `sotu`)."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError where the corpus is missing or damaged."""
        kinds = read_parquet(folder / "sources.parquet", columns=["source", "kind"])
        documents = read_parquet(folder / "documents.parquet", columns=["document", "source", "name", "group"])
        blocks = read_blocks(folder / "blocks.parquet")
        self.blocks = blocks.join(documents.join(kinds, on="source"), on="document", maintain_order="left")

    def passages(self, split: str, domain: str, length: int, most: int, seed: int) -> Passages:
        """The first `length` tokens of up to `most` blocks that are that long, in an order set by the seed. Raises
        InputError where there is none, or no such domain."""
        rows = self._of(split, domain).filter(pl.col("length") >= length)
        rows = rows.sample(fraction=1.0, shuffle=True, seed=seed).head(most)
        if rows.is_empty():
            raise InputError(f"No block of {split} text of {domain} has {length} tokens: shorten the passages.")
        tokens = stacked(rows.with_columns(pl.col("tokens").list.head(length)))
        return Passages(tokens, _groups(rows), rows["name"].to_list())

    def rows(self, split: str, domain: str, length: int, most_tokens: int, seed: int) -> list[tuple[Tensor, str]]:
        """Rows of up to `length` consecutive tokens of one document, at least half as long where documents allow it,
        with the document's group, in an order set by the seed, until `most_tokens` are reached."""
        found = [
            (torch.tensor(tokens[start : start + length]), group)
            for tokens, group in _documents(self._of(split, domain))
            for start in range(0, len(tokens), length)
        ]
        long = [each for each in found if len(each[0]) >= length / 2] or found
        order = np.random.default_rng(seed).permutation(len(long)).tolist()
        kept, tokens = [], 0
        for i in order:
            kept.append(long[i])
            tokens += len(long[i][0])
            if tokens >= most_tokens:
                break
        return kept

    def _of(self, split: str, domain: str) -> pl.DataFrame:
        rows = self.blocks.filter((pl.col("split") == split) & (pl.col("kind") == domain))
        if rows.is_empty():
            kinds = ", ".join(sorted(self.blocks["kind"].unique()))
            raise InputError(f"repetition: domains: there is no {split} text of kind {domain!r}; there are {kinds}.")
        return rows


def _documents(rows: pl.DataFrame) -> Iterator[tuple[list[int], str]]:
    """Runs of consecutive blocks of each document: (tokens, group)."""
    at: dict[str, Any] = {"document": None, "next": 0, "group": ""}
    tokens: list[int] = []
    for row in rows.sort("document", "start").iter_rows(named=True):
        if tokens and (row["document"] != at["document"] or row["start"] != at["next"]):
            yield tokens, at["group"]
            tokens = []
        tokens = tokens + row["tokens"]
        group = f"{row['source']}|{row['group']}"
        at = {"document": row["document"], "next": row["start"] + row["length"], "group": group}
    if tokens:
        yield tokens, at["group"]


def stacked(rows: pl.DataFrame, column: str = "tokens") -> Int[Tensor, "texts seq"]:
    """Token ids of a column of lists, all of one length."""
    return torch.from_numpy(np.stack(rows[column].to_list())).long()


def _groups(rows: pl.DataFrame) -> list[str]:
    return [f"{source}|{group}" for source, group in rows.select("source", "group").iter_rows()]
