"""A corpus for small language models: a byte-level BPE vocabulary that fits their size, and blocks of its tokens."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
from jaxtyping import Bool, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from trimtab.checkpoint import atomic, load_tensors, read_json, save_tensors
from trimtab.errors import InputError
from trimtab.validation import require

BOUNDARY = "<|endoftext|>"
"""Between documents, and before the first: id 0."""
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class TextConfig:
    """Section `pretrain_text`."""

    vocabulary: int = 2048
    """Tokens of the vocabulary trained on the corpus: small, so that embeddings fit small models."""

    def __post_init__(self) -> None:
        rule = "at least 257, for a byte-level vocabulary"
        require(self.vocabulary >= 257, "vocabulary", self.vocabulary, rule)


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


def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer that `Text.save` wrote. Raises InputError where it is missing or damaged."""
    read_json(folder / "tokenizer.json")
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # which tokenizers raises for JSON that is no tokenizer
        raise InputError(
            f"{folder}/tokenizer.json holds no tokenizer ({error}): delete it and run its stage again."
        ) from None


@dataclass(frozen=True)
class Text:
    """Tokens of each split, documents one after the other, and how many characters they stand for."""

    tokens: dict[str, Int[Tensor, " tokens"]]
    groups: dict[str, Int[Tensor, " documents"]]
    """For each document of a split, which group of near relatives it belongs to: the unit that is resampled."""
    characters: dict[str, int]
    vocabulary: int

    @classmethod
    def of(cls, documents: pl.DataFrame, tokenizer: Tokenizer) -> "Text":
        """From documents with columns `text`, `split`, `source` and `group`; each is preceded by the boundary."""
        tokens, groups, characters = {}, {}, {}
        for split in SPLITS:
            chosen = documents.filter(pl.col("split") == split)
            texts, related = chosen["text"].to_list(), chosen.select("source", "group").rows()
            numbers = {name: number for number, name in enumerate(dict.fromkeys(related))}
            groups[split] = torch.tensor([numbers[name] for name in related], dtype=torch.int32)
            ids = [i for text in tokenizer.encode_batch(texts) for i in (tokenizer.token_to_id(BOUNDARY), *text.ids)]
            tokens[split] = torch.tensor(ids, dtype=torch.int32)
            characters[split] = sum(map(len, texts))
        return cls(tokens, groups, characters, tokenizer.get_vocab_size())

    def save(self, folder: Path, tokenizer: Tokenizer) -> None:
        """`tokens.safetensors` and `tokenizer.json`, atomically."""
        with atomic(folder) as partial:
            partial.mkdir(parents=True)
            metadata = {split: str(n) for split, n in self.characters.items()} | {"vocabulary": str(self.vocabulary)}
            of_documents = {f"groups.{split}": groups for split, groups in self.groups.items()}
            save_tensors(partial / "tokens.safetensors", self.tokens | of_documents, metadata)
            tokenizer.save(str(partial / "tokenizer.json"))

    @classmethod
    def load(cls, folder: Path) -> "Text":
        """What `save` wrote."""
        tensors, metadata = load_tensors(folder / "tokens.safetensors")
        tokens, groups = ({split: tensors[f"{of}{split}"] for split in SPLITS} for of in ("", "groups."))
        return cls(tokens, groups, {split: int(metadata[split]) for split in SPLITS}, int(metadata["vocabulary"]))

    def blocks(self, split: str, length: int) -> Int[Tensor, "blocks length_and_1"]:
        """Consecutive blocks; a block's last token is the next one's first, so that each is predicted once."""
        tokens = self.tokens[split].long()
        n = (len(tokens) - 1) // length
        if n < 1:
            raise InputError(f"The split {split} has {len(tokens)} tokens: no block of {length + 1}.")
        at = torch.arange(n)[:, None] * length + torch.arange(length + 1)
        return tokens[at]

    def check(self, vocabulary: int) -> None:
        """Raise InputError unless the vocabulary is of this size."""
        if vocabulary != self.vocabulary:
            raise InputError(
                f"pretrain: vocabulary is {vocabulary}, but the text was written in one of {self.vocabulary}."
            )

    def groups_of(self, split: str, length: int) -> Int[Tensor, " blocks"]:
        """Which group the document in the middle of each block belongs to."""
        number = (self.tokens[split] == 0).cumsum(0) - 1  # the boundary precedes each
        return self.groups[split][number[length // 2 : (len(number) - 1) // length * length : length]]

    def common(self, times: int) -> Int[Tensor, " pairs"]:
        """Pairs of a token and the next that stand more than so many times in the training text, as `pairs` numbers
        them: a model can know them without looking back."""
        numbers, counts = pairs(self.tokens["train"].long(), self.vocabulary).unique(return_counts=True)
        return numbers[counts > times]


def pairs(tokens: Int[Tensor, "*batch length_and_1"], vocabulary: int) -> Int[Tensor, "*batch length"]:
    """A number for each token and the one before it."""
    return tokens[..., :-1] * vocabulary + tokens[..., 1:]


def recalls(
    blocks: Int[Tensor, "blocks length_and_1"], vocabulary: int, common: Int[Tensor, " pairs"] | None = None
) -> Bool[Tensor, "blocks length"]:
    """Which predictions, of `blocks[:, 1:]`, take recall (Zoology, section 3): the pair of the token and its
    predecessor stood in the block before, and is not among those `common` in training text."""
    numbers = pairs(blocks, vocabulary)
    order = numbers.argsort(dim=1, stable=True)
    ordered = numbers.gather(1, order)
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    found = torch.zeros_like(again).scatter_(1, order, again)
    return found if common is None else found & ~torch.isin(numbers, common)
