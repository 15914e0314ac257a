"""Tokenizer, blocks and which of their tokens could be recalled."""

from collections import Counter
from itertools import pairwise

import polars as pl
import pytest
import torch

from trimtab.errors import InputError
from trimtab.rebased.text import BOUNDARY, Text, recalls, train_tokenizer

TEXTS = ["the cat sat on the mat. " * 20, "a dog saw the cat — and Ünïcode\x00 bytes. " * 20, "the end " * 30]


def frame(texts, splits, groups=None):
    groups = groups or [str(i) for i in range(len(texts))]
    return pl.DataFrame({"text": texts, "split": splits, "source": ["s"] * len(texts), "group": groups})


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 280)


def test_a_text_survives_its_tokens(tokenizer):
    assert tokenizer.get_vocab_size() == 280
    assert tokenizer.token_to_id(BOUNDARY) == 0
    for text in (*TEXTS, "never seen: 漢字 \U0001f6f6"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_blocks_hold_every_token_and_predict_each_once(tokenizer, tmp_path):
    documents = frame([*TEXTS, TEXTS[0]], ["train", "val", "test", "train"])
    text = Text.of(documents, tokenizer)
    assert text.characters == {"train": 2 * len(TEXTS[0]), "val": len(TEXTS[1]), "test": len(TEXTS[2])}
    assert int((text.tokens["train"] == 0).sum()) == 2
    blocks = text.blocks("train", 16)
    assert torch.equal(blocks[:-1, -1], blocks[1:, 0])
    assert torch.equal(blocks[:, 1:].flatten(), text.tokens["train"][1 : 1 + 16 * len(blocks)].long())
    text.save(tmp_path / "text", tokenizer)
    loaded = Text.load(tmp_path / "text")
    assert loaded.vocabulary == 280
    assert loaded.characters == text.characters
    assert all(torch.equal(loaded.tokens[split], text.tokens[split]) for split in text.tokens)


def test_blocks_belong_to_the_group_of_the_document_in_their_middle(tokenizer):
    texts, groups = [TEXTS[0], TEXTS[1], TEXTS[0], *TEXTS[1:]], ["a", "b", "a", "c", "d"]
    text = Text.of(frame(texts, ["train"] * 3 + ["val", "test"], groups), tokenizer)
    starts = (text.tokens["train"] == 0).nonzero()[:, 0].tolist()
    for length in (15, 16):
        found = text.groups_of("train", length)
        assert len(found) == len(text.blocks("train", length))
        middles = [i * length + length // 2 for i in range(len(found))]
        documents = [max(d for d, start in enumerate(starts) if start <= middle) for middle in middles]
        assert found.tolist() == [(0, 1, 0)[d] for d in documents]
        assert set(documents) == {0, 1, 2}


def test_common_pairs_are_counted_in_training_text(tokenizer):
    text = Text.of(frame(TEXTS, ["train", "val", "test"]), tokenizer)
    ids = text.tokens["train"].tolist()
    counts = Counter(pairwise(ids))
    expected = sorted(a * 280 + b for (a, b), n in counts.items() if n > 5)
    assert expected
    assert text.common(5).tolist() == expected


def test_what_is_too_short_is_named(tokenizer):
    with pytest.raises(InputError, match="ask for fewer"):
        train_tokenizer(["abc"], 400)
    with pytest.raises(InputError, match="at least 257"):
        train_tokenizer(TEXTS, 100)
    documents = frame(TEXTS, ["train", "val", "test"])
    with pytest.raises(InputError, match="no block of 5001"):
        Text.of(documents, tokenizer).blocks("val", 5000)


def test_recalled_are_pairs_that_stood_in_the_block_before():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.cat([torch.tensor([[1, 2, 3, 1, 2, 1, 2, 3, 3]]), torch.randint(0, 4, (5, 9), generator=generator)])
    expected = [
        [any(row[j] == row[i] and row[j + 1] == row[i + 1] for j in range(i)) for i in range(8)]
        for row in blocks.tolist()
    ]
    assert recalls(blocks, 4).tolist() == expected
    assert expected[0] == [False, False, False, True, False, True, True, False]
    known = recalls(blocks, 4, torch.tensor([2 * 4 + 3]))  # the pair 2, 3
    assert known[0].tolist() == [False, False, False, True, False, True, False, False]
