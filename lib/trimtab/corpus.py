"""Documents -> splits -> token blocks, with every token traceable to the characters it came from."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm

from trimtab.checkpoint import file_sha256
from trimtab.errors import InputError
from trimtab.files import read_parquet
from trimtab.validation import at_least, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "val", "test")
Block = tuple[str, int, int, int, list[int], list[int], list[int]]
BLOCKS: dict[str, Any] = {
    "split": pl.String,
    "document": pl.Int32,
    "start": pl.Int32,
    "length": pl.Int32,
    "tokens": pl.List(pl.Int32),
    "char_start": pl.List(pl.Int32),
    "char_end": pl.List(pl.Int32),
}


@dataclass(frozen=True)
class CorpusConfig:
    """How documents become blocks of tokens."""

    block_tokens: int = 256
    """Tokens in a full block; the last block of a document may be shorter."""
    min_block_tokens: int = 32
    """A document's last block is dropped below this length."""
    val_fraction: float = 0.05
    """Share of the groups of each source that goes to validation, in (0, 0.5)."""
    test_fraction: float = 0.1
    """Share of the groups of each source that goes to the test split, in (0, 0.5)."""

    def __post_init__(self) -> None:
        at_least(2, self, "block_tokens")
        at_least(2, self, "min_block_tokens")
        rule = f"at most `block_tokens` = {self.block_tokens}"
        require(self.min_block_tokens <= self.block_tokens, "min_block_tokens", self.min_block_tokens, rule)
        for name in ("val_fraction", "test_fraction"):
            require(0 < getattr(self, name) < 0.5, name, getattr(self, name), "a number between 0 and 0.5")


def split_documents(documents: pl.DataFrame, config: CorpusConfig, seed: int) -> pl.DataFrame:
    """Give each document an id and a split: columns `document` (int32) and `split` are added.

    Whole groups are assigned, per source, by the rank of a keyed hash: adding a source never moves another's documents.
    Each source needs at least three groups, so that no split is empty.
    """
    groups = documents.select("source", "group").unique(maintain_order=True)
    rank = [hashlib.sha256(f"{seed}|{source}|{group}".encode()).hexdigest() for source, group in groups.iter_rows()]
    groups = groups.with_columns(pl.Series("hash", rank)).with_columns(
        pl.col("hash").rank("ordinal").over("source").sub(1).alias("rank"), pl.len().over("source").alias("n")
    )
    small = groups.filter(pl.col("n") < 3)["source"].unique().to_list()
    if small:
        raise InputError(f"{small[0]} has fewer than 3 groups of documents: too few to split into train, val and test.")
    test = (pl.col("n") * config.test_fraction).round().clip(lower_bound=1)
    val = (pl.col("n") * config.val_fraction).round().clip(lower_bound=1)
    groups = groups.with_columns(
        pl.when(pl.col("rank") < test)
        .then(pl.lit("test"))
        .when(pl.col("rank") < test + val)
        .then(pl.lit("val"))
        .otherwise(pl.lit("train"))
        .alias("split")
    )
    return (
        documents.join(groups.select("source", "group", "split"), on=["source", "group"], maintain_order="left")
        .with_row_index("document")
        .with_columns(pl.col("document").cast(pl.Int32))
    )


def deduplicate(documents: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """Remove from train every paragraph that also stands in val or test, and from val every one that stands in test.

    Evaluation texts stay whole. Paragraphs are compared exactly, after joining runs of white space. Returns the table
    (documents left empty are dropped) and the number of paragraphs removed.
    """
    seen: set[str] = set()
    removed = 0
    texts: dict[int, str] = {}
    for split in reversed(SPLITS):
        here: set[str] = set()
        for document, text in documents.filter(pl.col("split") == split).select("document", "text").iter_rows():
            kept = []
            for paragraph in text.split("\n\n"):
                key = " ".join(paragraph.split())
                if key in seen:
                    removed += 1
                    continue
                here.add(key)
                kept.append(paragraph)
            texts[document] = "\n\n".join(kept)
        seen |= here - {""}
    rewritten = pl.Series("text", [texts[i] for i in documents["document"]], dtype=pl.String)
    return documents.with_columns(rewritten).filter(pl.col("text").str.len_chars() > 0), removed


def token_blocks(documents: pl.DataFrame, tokenizer: "PreTrainedTokenizerBase", config: CorpusConfig) -> pl.DataFrame:
    """Cut each document into blocks of token ids; no block crosses a document, and none holds special tokens:
    "</s>" in a text is four characters.

    Columns: `split`, `document` (int32), `start` (int32, first token's index in its document), `length` (int32),
    `tokens` (list of int32), `char_start` and `char_end` (lists of int32: offsets into the document's `text`).
    """
    parts = []
    with tqdm(total=documents.height, desc="tokenise", unit="document", mininterval=1) as bar:
        # Some documents at a time: as Python lists, the ids of a large corpus would not fit in memory.
        for some in documents.select("split", "document", "text").iter_slices(1000):
            encoded = tokenizer(
                some["text"].to_list(), add_special_tokens=False, split_special_tokens=True, verbose=False,
                return_offsets_mapping=True,
            )  # fmt: skip
            rows: list[Block] = []
            for split, document, ids, offsets in zip(
                some["split"], some["document"], encoded["input_ids"], encoded["offset_mapping"], strict=True
            ):
                rows += _cut(split, document, ids, offsets, config)
            parts.append(pl.DataFrame(rows, schema=BLOCKS, orient="row"))
            bar.update(some.height)
    blocks = pl.concat(parts)
    if blocks.is_empty():
        raise InputError(f"No document reaches min_block_tokens = {config.min_block_tokens} tokens.")
    return blocks


def _cut(
    split: str, document: int, ids: list[int], offsets: list[tuple[int, int]], config: CorpusConfig
) -> Iterator[Block]:
    for start in range(0, len(ids), config.block_tokens):
        block, spans = ids[start : start + config.block_tokens], offsets[start : start + config.block_tokens]
        if len(block) >= config.min_block_tokens:
            yield split, document, start, len(block), block, [s for s, _ in spans], [e for _, e in spans]


def describe(documents: pl.DataFrame, blocks: pl.DataFrame) -> pl.DataFrame:
    """One row per source and split: documents, characters, bytes, blocks, tokens, and characters per token."""
    tokens = (
        blocks.join(documents.select("document", "source"), on="document")
        .group_by("source", "split")
        .agg(pl.len().alias("blocks"), pl.col("length").sum().alias("tokens"))
    )
    texts = documents.group_by("source", "split").agg(
        pl.len().alias("documents"),
        pl.col("text").str.len_chars().sum().alias("characters"),
        pl.col("text").str.len_bytes().sum().alias("bytes"),
    )
    order = pl.col("split").replace_strict({name: i for i, name in enumerate(SPLITS)}, return_dtype=pl.Int8)
    return (
        texts.join(tokens, on=["source", "split"], how="left")
        .with_columns(pl.col("blocks", "tokens").fill_null(0))
        .with_columns((pl.col("characters") / pl.col("tokens")).alias("characters_per_token"))
        .sort("source", order)
    )


def read_blocks(path: Path) -> pl.DataFrame:
    """What `token_blocks` made, without the characters' offsets."""
    return read_parquet(path, columns=[name for name in BLOCKS if name not in ("char_start", "char_end")])


class Blocks:
    """The token blocks of one split as a `datasets.Dataset`, and as padded batches in a fixed order."""

    def __init__(self, path: Path, split: str, max_tokens: int | None = None, seed: int = 0) -> None:
        """Take blocks of `split`, shuffled by `seed`, until `max_tokens` are reached (all when None).

        Shuffling blocks before cutting keeps every source and document in a small budget.
        """
        if split not in SPLITS:
            raise InputError(f"{split!r} is not a split: {', '.join(SPLITS)}.")
        chosen = read_blocks(path).filter(pl.col("split") == split)
        table = chosen.sample(fraction=1.0, shuffle=True, seed=seed)
        if max_tokens is not None:
            table = table.filter(pl.col("length").cast(pl.Int64).cum_sum() <= max_tokens)
        if table.is_empty():
            raise InputError(f"{path} has no block of {split} within {max_tokens} tokens.")
        self.dataset = Dataset.from_polars(table)
        self.tokens = int(table["length"].sum())
        """Number of tokens, padding not counted."""
        self.documents = table["document"].n_unique()
        """Number of documents they come from."""
        self.digest = fingerprint_of(path, split, max_tokens, seed)

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self, start: int, stop: int, size: int, pad: int, bos: int | None) -> Iterator["Batch"]:
        """Batches over blocks `start` to `stop`, right-padded with `pad`, each preceded by `bos` where there is one."""
        for first in range(start, stop, size):
            rows = self.dataset[first : min(first + size, stop)]
            lists = rows["tokens"]
            lead = [] if bos is None else [bos]
            width = max(map(len, lists)) + len(lead)
            ids = torch.full((len(lists), width), pad, dtype=torch.long)
            mask = torch.zeros((len(lists), width), dtype=torch.long)
            for i, tokens in enumerate(lists):
                ids[i, : len(tokens) + len(lead)] = torch.tensor(lead + tokens)
                mask[i, : len(tokens) + len(lead)] = 1
            yield Batch(ids, mask, torch.tensor(rows["document"]), torch.tensor(rows["start"]), len(lead))


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids `[batch, seq]` with their attention mask, document ids and first token index `[batch]`."""

    input_ids: Tensor
    attention_mask: Tensor
    document: Tensor
    start: Tensor
    lead: int
    """Number of special tokens before each block (1 with a BOS, else 0)."""


def fingerprint_of(path: Path, split: str, max_tokens: int | None, seed: int) -> str:
    """A digest of exactly the blocks that `Blocks` serves."""
    return hashlib.sha256(f"{file_sha256(path)}|{split}|{max_tokens}|{seed}".encode()).hexdigest()
