"""What the comparison shows of texts: tables fit to be read, and continuations side by side."""

from collections.abc import Sequence

import polars as pl
from transformers import PreTrainedTokenizerBase

from trimtab.markup import whole_characters
from trimtab.repetition.comparison import HUMAN
from trimtab.repetition.loops import side_by_side
from trimtab.repetition.ngrams import repeated
from trimtab.repetition.texts import stacked


def quality_table(summary: pl.DataFrame) -> pl.DataFrame:
    """`evaluation.Judge.summary`, means over seeds, rounded; a set counts as rejected by what rejects any seed."""
    numbers = [name for name, kind in summary.schema.items() if kind.is_numeric() and name != "seed"]
    reasons = pl.col("rejected_by").filter(pl.col("rejected_by") != "").unique(maintain_order=True).str.join("; ")
    table = summary.group_by("arm", "decoder", maintain_order=True).agg(pl.col(*numbers).mean(), reasons)
    return table.with_columns(pl.col(name).round(1 if table[name].abs().max() > 10 else 3) for name in numbers)  # type: ignore[operator]


def generations(
    texts: pl.DataFrame, domain: str, tokenizer: PreTrainedTokenizerBase, *, arms: Sequence[str], shown: int
) -> str:
    """HTML: greedy continuations of the first seed for the first prefixes, an arm a column, tokens of repeated 4-grams
    marked."""
    here = texts.filter((pl.col("domain") == domain) & pl.col("decoder").is_in(["greedy", HUMAN]))
    columns = {}
    for arm in arms:
        rows = here.filter(pl.col("arm") == arm)
        rows = rows.filter(pl.col("seed") == rows["seed"].min()).sort("text").head(shown)
        tokens = stacked(rows)
        marks = repeated(tokens, 4)
        columns[arm] = [
            (_pieces(tokenizer, ids), mask) for ids, mask in zip(tokens.tolist(), marks.tolist(), strict=True)
        ]
    first = here.filter(pl.col("arm") == HUMAN).sort("text").head(shown)
    return side_by_side([str(tokenizer.decode(ids)) for ids in first["prefix"].to_list()], columns)


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Text of each token in its context: a character of several tokens is the last one's."""
    found = [""] * len(ids)
    for some, text in whole_characters(tokenizer, ids):
        found[some.stop - 1] = text
    return found
