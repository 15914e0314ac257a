"""A corpus for small language models: a byte-level BPE vocabulary that fits their size, and blocks of its tokens."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
from jaxtyping import Bool, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from trimtab.checkpoint import atomic, load_tensors, save_tensors
from trimtab.errors import InputError

BOUNDARY = "<|endoftext|>"
"""Between documents, and before the first: id 0."""
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class TextConfig:
    """Section `pretrain_text`."""

    vocabulary: int = 2048
    """Tokens of the vocabulary trained on the corpus: small, so that embeddings fit small models."""

    def __post_init__(self) -> None:
        if self.vocabulary < 257:
            raise InputError(f"pretrain_text: a byte-level vocabulary has at least 257 tokens, not {self.vocabulary}.")


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE with `vocabulary` tokens, the boundary and all 256 bytes among them.

    Raises InputError where the texts are too short for so many.
    """
    if vocabulary < 257:
        raise InputError(f"A byte-level vocabulary has at least 257 tokens, not {vocabulary}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[BOUNDARY], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise InputError(f"The texts hold only {tokenizer.get_vocab_size()} of {vocabulary} tokens: ask for fewer.")
    return tokenizer


@dataclass(frozen=True)
class Text:
    """Tokens of each split, documents one after the other, and how many characters they stand for."""

    tokens: dict[str, Int[Tensor, " tokens"]]
    characters: dict[str, int]
    vocabulary: int

    @classmethod
    def of(cls, documents: pl.DataFrame, tokenizer: Tokenizer) -> "Text":
        """From documents with columns `text` and `split`; each is preceded by the boundary."""
        tokens, characters = {}, {}
        for split in SPLITS:
            texts = documents.filter(pl.col("split") == split)["text"].to_list()
            ids = [i for text in tokenizer.encode_batch(texts) for i in (tokenizer.token_to_id(BOUNDARY), *text.ids)]
            tokens[split] = torch.tensor(ids, dtype=torch.int32)
            characters[split] = sum(map(len, texts))
        return cls(tokens, characters, tokenizer.get_vocab_size())

    def save(self, folder: Path, tokenizer: Tokenizer) -> None:
        """`tokens.safetensors` and `tokenizer.json`, atomically."""
        with atomic(folder) as partial:
            partial.mkdir(parents=True)
            metadata = {split: str(n) for split, n in self.characters.items()} | {"vocabulary": str(self.vocabulary)}
            save_tensors(partial / "tokens.safetensors", self.tokens, metadata)
            tokenizer.save(str(partial / "tokenizer.json"))

    @classmethod
    def load(cls, folder: Path) -> "Text":
        """What `save` wrote."""
        tokens, metadata = load_tensors(folder / "tokens.safetensors")
        return cls(tokens, {split: int(metadata[split]) for split in SPLITS}, int(metadata["vocabulary"]))

    def blocks(self, split: str, length: int) -> Int[Tensor, "blocks length_and_1"]:
        """Consecutive blocks; a block's last token is the next one's first, so that each is predicted once."""
        tokens = self.tokens[split].long()
        n = (len(tokens) - 1) // length
        if n < 1:
            raise InputError(f"The split {split} has {len(tokens)} tokens: no block of {length + 1}.")
        at = torch.arange(n)[:, None] * length + torch.arange(length + 1)
        return tokens[at]

    def documents(self, split: str, length: int) -> Int[Tensor, " blocks"]:
        """Which document of the split stands in the middle of each block."""
        number = (self.tokens[split] == 0).cumsum(0) - 1  # the boundary precedes each
        return number[length // 2 : (len(number) - 1) // length * length : length]


def recalls(blocks: Int[Tensor, "blocks length_and_1"]) -> Bool[Tensor, "blocks length"]:
    """Which predictions could be recalled (Zoology, section 3): the pair of a token and its predecessor stood in the
    block before. Of `blocks[:, 1:]`."""
    pairs = blocks[:, :-1] * (int(blocks.max()) + 1) + blocks[:, 1:]
    order = pairs.argsort(dim=1, stable=True)
    ordered = pairs.gather(1, order)
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(again).scatter_(1, order, again)
