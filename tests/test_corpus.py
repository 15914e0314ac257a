"""Splits do not leak, blocks lose nothing, and every token leads back to its characters."""

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.corpus import SPLITS, Blocks, CorpusConfig, deduplicate, describe, split_documents, token_blocks
from trimtab.errors import InputError
from trimtab.texts import DOCUMENTS

CONFIG = CorpusConfig(block_tokens=32, min_block_tokens=8, val_fraction=0.2, test_fraction=0.2)


def table(texts, source="toy", groups=None):
    rows = [(source, f"d{i}", groups[i] if groups else f"g{i}", text) for i, text in enumerate(texts)]
    return pl.DataFrame(rows, schema=DOCUMENTS, orient="row")


def test_groups_stay_together_and_shares_are_as_asked(documents):
    split = split_documents(documents, CONFIG, seed=0)
    assert split.group_by("group").agg(pl.col("split").n_unique())["split"].max() == 1
    groups = split.group_by("split").agg(pl.col("group").n_unique().alias("n"))
    assert dict(groups.iter_rows()) == {"train": 12, "val": 4, "test": 4}
    assert split["document"].to_list() == list(range(40))


def test_adding_a_source_moves_no_other_document_and_the_seed_moves_them(documents):
    alone = split_documents(documents, CONFIG, seed=0)
    both = split_documents(pl.concat([table(["a", "b", "c", "d"], source="other"), documents]), CONFIG, seed=0)
    assert both.filter(pl.col("source") == "toy")["split"].to_list() == alone["split"].to_list()
    assert split_documents(documents, CONFIG, seed=1)["split"].to_list() != alone["split"].to_list()


def test_too_few_groups_are_refused():
    with pytest.raises(InputError, match="toy has fewer than 3 groups"):
        split_documents(table(["a", "b"]), CONFIG, seed=0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(SPLITS), st.lists(st.sampled_from("abcdefg "), max_size=5)), min_size=1, max_size=9
    )
)
def test_deduplication_equals_a_naive_one(rows):
    texts = ["\n\n".join(f"para {letter}" for letter in letters) for _, letters in rows]
    given_splits = [split for split, _ in rows]
    documents = table(texts).with_row_index("document").with_columns(pl.Series("split", given_splits))
    clean, removed = deduplicate(documents)
    forbidden = {"test": set(), "val": {"test"}, "train": {"test", "val"}}
    expected, count = {}, 0
    for i, (split, _) in enumerate(rows):
        others = {p for j, (s, _) in enumerate(rows) if s in forbidden[split] for p in texts[j].split("\n\n")} - {""}
        kept = [p for p in texts[i].split("\n\n") if p not in others]
        count += len(texts[i].split("\n\n")) - len(kept)
        if "\n\n".join(kept):
            expected[i] = "\n\n".join(kept)
    assert dict(clean.select("document", "text").iter_rows()) == expected
    assert removed >= 0
    # A paragraph dropped from val is not "seen there" for train, yet it stands in test all the same.
    assert removed == count


def test_blocks_hold_every_token_in_order_and_lead_back_to_the_text(documents, tokenizer):
    split = split_documents(documents, CONFIG, seed=0)
    blocks = token_blocks(split, tokenizer, CONFIG)
    for row in split.iter_rows(named=True):
        own = blocks.filter(pl.col("document") == row["document"]).sort("start")
        joined = [t for tokens in own["tokens"] for t in tokens]
        whole = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        assert joined == whole[: len(joined)]
        assert len(whole) - len(joined) < CONFIG.min_block_tokens
        for block in own.iter_rows(named=True):
            assert block["length"] == len(block["tokens"]) <= CONFIG.block_tokens
            text = row["text"][block["char_start"][0] : block["char_end"][-1]]
            assert tokenizer.decode(block["tokens"]).strip("�") in text
    summary = describe(split, blocks)
    assert summary["tokens"].sum() == blocks["length"].sum()
    assert summary["characters"].sum() == split["text"].str.len_chars().sum()


def test_no_block_holds_a_special_token_that_a_text_spells(tokenizer):
    text = "<s>begins</s> and <pad></s></s><s> goes on, as many words as a block needs"
    split = table([text] * 3).with_columns(
        pl.lit("train").alias("split"), pl.int_range(3, dtype=pl.Int32).alias("document")
    )
    blocks = token_blocks(split, tokenizer, CONFIG)
    ids = blocks.filter(document=0)["tokens"].explode().to_list()
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == text[: len(tokenizer.decode(ids))]


def test_batches_are_right_padded_after_a_bos(blocks_file):
    blocks = Blocks(blocks_file, "train", 500, seed=1)
    assert blocks.tokens <= 500
    seen = 0
    for batch in blocks.batches(0, len(blocks), 3, pad=1, bos=0):
        for i in range(len(batch.input_ids)):
            row = blocks.dataset[seen]
            length = row["length"] + 1
            assert batch.input_ids[i, :length].tolist() == [0, *row["tokens"]]
            assert batch.attention_mask[i].tolist() == [1] * length + [0] * (batch.input_ids.shape[1] - length)
            assert (int(batch.document[i]), int(batch.start[i])) == (row["document"], row["start"])
            seen += 1
    assert seen == len(blocks)


def test_the_digest_tells_blocks_apart(blocks_file):
    digests = [
        Blocks(blocks_file, *args).digest for args in (("train", 500), ("train", 600), ("val", 500), ("train", 500, 1))
    ]
    assert len(set(digests)) == 4
    assert Blocks(blocks_file, "train", 500).digest == digests[0]
    assert torch.equal(*(next(Blocks(blocks_file, "train", 500).batches(0, 2, 2, 1, 0)).input_ids for _ in range(2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_fraction": 0.7}, "`val_fraction` must be a number between 0 and 0.5"),
        ({"min_block_tokens": 99}, "`min_block_tokens` must be at most `block_tokens` = 32"),
    ],
)
def test_configuration_is_checked(changes, message):
    with pytest.raises(InputError, match=message):
        CorpusConfig(**({"block_tokens": 32, "min_block_tokens": 8} | changes))
