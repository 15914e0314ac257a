"""Metrics of n-grams against their definitions in plain Python, and by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import InputError
from trimtab.repetition.ngrams import (
    as_ids,
    distinct,
    gram_ids,
    longest_repeat,
    periodic_tail,
    repeated,
    reward,
    seq_rep,
    uniq_seq,
    words,
)


def grams(tokens, n):
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


@st.composite
def ragged(draw):
    """(rows, tokens padded with a token that may stand in a text, lengths)"""
    width = draw(st.integers(0, 14))
    token = st.sampled_from([0, 1, 2, 2**31 - 1])
    rows = draw(st.lists(st.lists(token, max_size=width), min_size=1, max_size=5))
    padded = [row + [draw(token)] * (width - len(row)) for row in rows]
    return rows, torch.tensor(padded, dtype=torch.int64).reshape(len(rows), width), torch.tensor([*map(len, rows)])


@settings(deadline=None)
@given(ragged(), st.integers(1, 6))
def test_every_metric_is_its_definition(texts, n):
    rows, tokens, lengths = texts
    rep, mask, pay = seq_rep(tokens, n, lengths), repeated(tokens, n, lengths), reward(tokens, n, lengths)
    assert rep.dtype == torch.float64
    assert pay.dtype == torch.float32
    for i, row in enumerate(rows):
        found = grams(row, n)
        want = 1 - len(set(found)) / len(found) if found else math.nan
        assert rep[i].item() == pytest.approx(want, nan_ok=True)
        assert pay[i].item() == (pytest.approx(1 - want) if found else 0)
        marked = {start + o for start, gram in enumerate(found) if gram in found[:start] for o in range(n)}
        assert mask[i].tolist() == [t in marked for t in range(tokens.shape[1])]
    pooled = [gram for row in rows for gram in grams(row, n)]
    want = len(set(pooled)) / len(pooled) if pooled else math.nan
    assert distinct(tokens, n, lengths) == pytest.approx(want, nan_ok=True)
    assert uniq_seq(tokens, lengths) == len({token for row in rows for token in row})


@settings(deadline=None)
@given(st.integers(1, 12).flatmap(lambda t: st.lists(st.lists(st.integers(0, 2), min_size=t, max_size=t), min_size=1)))
def test_repeats_and_loops_are_their_definitions(rows):
    tokens = torch.tensor(rows)
    time = tokens.shape[1]
    longest, tail, twice = longest_repeat(tokens), periodic_tail(tokens), periodic_tail(tokens, least=2)
    for i, row in enumerate(rows):
        want = [n for n in range(1, time) if len(set(grams(row, n))) < len(grams(row, n))]
        assert longest[i] == max(want, default=0)
        for least, found in ((3, tail), (2, twice)):
            loops = [row[-unit:] * least == row[-least * unit :] for unit in range(1, time // least + 1)]
            assert found[i] == any(loops)
    assert torch.equal(seq_rep(tokens, 4, torch.full((len(rows),), time)).isnan(), seq_rep(tokens, 4).isnan())


def test_equal_numbers_are_equal_ngrams():
    tokens = torch.randint(0, 3, (20, 30), generator=torch.Generator().manual_seed(0))
    for n in range(1, 9):
        ids = gram_ids(tokens, n)
        pairs = {(gram, ids[i, j].item()) for i in range(20) for j, gram in enumerate(grams(tokens[i].tolist(), n))}
        assert len(pairs) == len({gram for gram, _ in pairs}) == len({number for _, number in pairs})


def test_by_hand():
    text = torch.tensor([[1, 2, 3, 9, 1, 2, 3, 1, 2]])
    # Bigrams 12 23 39 91 12 23 31 12: five distinct of eight.
    assert seq_rep(text, 2).tolist() == [3 / 8]
    assert reward(text, 2).tolist() == [5 / 8]
    assert repeated(text, 2)[0].int().tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert repeated(text, 3)[0].int().tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0]
    assert longest_repeat(text).tolist() == [3]


def test_the_last_ngram_is_checked():
    text = torch.tensor([[1, 2, 3, 4, 5, 1, 2, 3, 4]])
    assert repeated(text, 4)[0].nonzero()[:, 0].tolist() == [5, 6, 7, 8]
    assert seq_rep(text, 4).tolist() == [1 - 5 / 6]


def test_an_ngram_may_overlap_the_one_that_it_repeats():
    text = torch.tensor([[7, 7, 7, 7, 7]])
    assert repeated(text, 4)[0].tolist() == [False, True, True, True, True]
    assert seq_rep(text, 4).tolist() == [0.5]
    assert longest_repeat(text).tolist() == [4]


def test_texts_do_not_see_each_other_but_are_pooled_for_distinct():
    texts = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [6, 6, 6, 6, 6]])
    assert seq_rep(texts, 4).tolist() == [0, 0, 0.5]
    assert not repeated(texts, 4)[:2].any()
    assert distinct(texts, 4) == 3 / 6
    assert uniq_seq(texts) == 6


def test_what_is_too_short_is_no_number_and_earns_nothing():
    texts = torch.tensor([[1, 1, 1, 1], [1, 2, 3, 4]])
    lengths = torch.tensor([3, 4])
    assert seq_rep(texts, 4, lengths)[0].isnan()
    assert reward(texts, 4, lengths).tolist() == [0, 1]
    assert not repeated(texts, 4, lengths).any()
    assert seq_rep(texts, 5).isnan().all()
    assert repeated(texts, 5).shape == (2, 4)
    assert math.isnan(distinct(texts, 5))


def test_loops_at_the_end():
    texts = torch.tensor([[5, 1, 2, 1, 2, 1, 2], [1, 2, 1, 2, 1, 2, 5], [5, 5, 1, 2, 3, 1, 2], [9, 8, 7, 6, 3, 3, 3]])
    assert periodic_tail(texts).tolist() == [True, False, False, True]
    assert not periodic_tail(texts[:, -2:]).any()


def test_words_are_runs_marks_and_newlines():
    assert words("It's 3.5%,\n\n(naïve)  …") == [
        "It", "'", "s", "3", ".", "5", "%", ",", "\n", "\n", "(", "naïve", ")", "…",
    ]  # fmt: skip
    assert words(" \t") == []


def test_words_are_numbered_alike_in_all_texts_and_short_texts_drop_out():
    ids, lengths = as_ids([["a", "b", "a", "b", "a"], ["b", "a", "b"], [], ["c", "a", "d", "e"]])
    assert lengths.tolist() == [5, 0, 0, 4]
    assert ids[0].tolist() == [0, 1, 0, 1, 0]
    assert ids[3, :2].tolist() == [2, 0]
    assert seq_rep(ids, 1, lengths).tolist()[::3] == [pytest.approx(0.6), 0]
    assert seq_rep(ids, 1, lengths).isnan().tolist() == [False, True, True, False]
    assert uniq_seq(ids, lengths) == 5
    assert as_ids([])[0].shape == (0, 0)
    assert as_ids([[], []])[0].shape == (2, 0)


def test_bad_input_is_refused():
    text = torch.tensor([[1, 2, 3]])
    with pytest.raises(InputError, match="at least one token, not 0"):
        seq_rep(text, 0)
    with pytest.raises(InputError, match=r"must lie in \[0, 2\^31\), not in \[-100, 2\]"):
        seq_rep(torch.tensor([[1, 2, -100]]), 2)
    for length in (-1, 4):
        with pytest.raises(InputError, match="between 0 and the 3 places"):
            seq_rep(text, 1, torch.tensor([length]))
    with pytest.raises(InputError, match="at least two rounds"):
        periodic_tail(text, 1)
