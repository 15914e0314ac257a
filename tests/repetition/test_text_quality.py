"""Quality metrics at their ends and by hand; and that no cheap trick passes for text."""

import dataclasses
import itertools
import math
import zlib
from collections import Counter

import numpy as np
import pytest
import torch

from trimtab.errors import InputError
from trimtab.repetition.ngrams import seq_rep
from trimtab.repetition.text_quality import (
    Scores,
    coherence,
    copied,
    embedding_mauve,
    frontier_area,
    mtld,
    rejected_by,
    self_bleu,
    zlib_ratio,
)

DIVERSE = "the quick brown fox jumps over a lazy dog while seven wizards quietly brew jars of strange purple ink"
PREFIX, TIME, WORDS = 50, 100, 600


def test_coherence_is_the_cosine_of_each_row():
    a, b = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 2.0], [6.0, 8.0]])
    assert coherence(a, b).tolist() == pytest.approx([0, 1])


def test_copied_counts_what_stands_in_the_own_prefix():
    prefix = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 6]])
    continuation = torch.tensor([[2, 3, 4, 5, 1], [1, 2, 3, 4, 5]])
    # 2345 stands there, 3451 would only across the seam; the other prefix has 1234 and 2345, its own has not.
    assert copied(prefix, continuation).tolist() == [0.5, 0]
    assert copied(prefix, continuation, n=2).tolist() == [0.75, 0]
    assert copied(prefix[:, :3], continuation).tolist() == [0, 0]
    assert copied(prefix, continuation[:, :3]).isnan().all()


class TestSelfBleu:
    def test_ends(self):
        assert self_bleu([DIVERSE] * 3) == pytest.approx(1)
        assert self_bleu(["a b c d e", "f g h i j", "k l m n o"]) < 0.1

    def test_by_hand(self):
        # Each of six words, five in common: precisions 5/6, 4/5, 3/4, 2/3, equal lengths.
        expected = (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25
        assert self_bleu(["a b c d e f", "a b c d e g"]) == pytest.approx(expected)

    def test_a_seed_decides_the_sample(self):
        texts = [f"w{i} w{i % 7} w{i % 5} w{i % 3} end" for i in range(40)]
        assert self_bleu(texts, sample=5) == self_bleu(texts, sample=5)
        assert self_bleu(texts, sample=5) != self_bleu(texts, sample=5, seed=1)
        assert self_bleu(texts, sample=99) == pytest.approx(self_bleu(texts[::-1], sample=40))

    def test_empty_texts_and_too_few(self):
        assert self_bleu(["", "a b c d"]) == 0
        with pytest.raises(InputError, match="at least two, not 1"):
            self_bleu(["a"])


class TestMtld:
    def test_repetition_lowers_it(self):
        assert mtld(["again " * 30]) == pytest.approx(2)  # the share of distinct words is 1/2 at every second word
        assert mtld([DIVERSE * 3]) > 15
        assert mtld([DIVERSE, "again " * 30]) == pytest.approx((mtld([DIVERSE]) + 2) / 2)

    def test_without_words_there_is_none(self):
        for texts in ([], [""], ["… 3.5 !"], ["only three words"]):
            assert math.isnan(mtld(texts))
        assert mtld(["", DIVERSE]) == mtld([DIVERSE])


def test_zlib_ratio_is_the_mean_of_ratios():
    texts = ["ab" * 200, "é", ""]
    ratios = [len(zlib.compress(text.encode(), 9)) / len(text.encode()) for text in texts[:2]]
    assert zlib_ratio(texts) == pytest.approx(np.mean(ratios))
    assert zlib_ratio(texts[:1]) < 0.1
    assert math.isnan(zlib_ratio(["", ""]))


class TestMauve:
    def test_ends(self):
        generator = torch.Generator().manual_seed(0)
        p = torch.randn(60, 4, generator=generator)
        assert embedding_mauve(p, p.clone(), 6, [0, 1]) == pytest.approx(1, abs=1e-6)
        assert embedding_mauve(p, p + 1000, 6, [0, 1]) < 0.05

    def test_it_falls_with_distance_and_is_symmetric(self):
        generator = torch.Generator().manual_seed(0)
        p = torch.randn(200, 4, generator=generator)
        q = torch.randn(200, 4, generator=generator)
        near, middle, far = (embedding_mauve(p, q + shift, 8, [0, 1, 2]) for shift in (0, 0.7, 2))
        assert 0.8 < near <= 1
        assert near > middle > far
        histograms = np.array([0.5, 0.3, 0.2, 0]), np.array([0.1, 0.1, 0.4, 0.4])
        assert frontier_area(*histograms) == pytest.approx(frontier_area(*histograms[::-1]))

    def test_the_area_is_that_of_the_curve(self, monkeypatch):
        """Disjoint: x = (1 - w)^5 and y = w^5, with area 1/252 below; half common: by fine integration."""
        monkeypatch.setattr("trimtab.repetition.text_quality.MIXTURES", 4001)
        assert frontier_area(np.array([1.0, 0]), np.array([0, 1.0])) == pytest.approx(1 / 252, rel=1e-3)
        w = np.linspace(1e-9, 1 - 1e-9, 200_001)
        # p = (1/2, 1/2, 0), q = (1/2, 0, 1/2): KL(q || r) = -log(1 - w) / 2, KL(p || r) = -log(w) / 2.
        x, y = (1 - w) ** 2.5, w**2.5
        area = frontier_area(np.array([0.5, 0.5, 0]), np.array([0.5, 0, 0.5]))
        assert area == pytest.approx(np.trapezoid(y[::-1], x[::-1]), rel=1e-3)

    def test_bad_input_is_refused(self):
        p = torch.zeros(3, 2)
        for wrong in ((p, p, 1, [0]), (p, p, 7, [0]), (p, p, 2, []), (p[:0], p, 2, [0])):
            with pytest.raises(InputError, match="give two sets, at least 2 clusters"):
                embedding_mauve(*wrong)


@pytest.fixture(scope="module")
def world():
    """(scores of continuations, human prefixes, human continuations) of a world of text in which all can be computed:
    topics of bigram chains; a bigram model that also copies, as language models do, for the base; bags of words."""
    generator = np.random.default_rng(0)
    follows = generator.integers(1, WORDS, (WORDS, 12))
    topics = [generator.choice(WORDS, 120, replace=False) for _ in range(8)]

    def text(topic):
        row = [int(generator.choice(topic))]
        while len(row) < PREFIX + TIME:
            # One word in two follows from the last, others are the topic's.
            row.append(int(generator.choice(follows[row[-1]] if generator.random() < 0.5 else topic)))
        return row

    train = [text(topics[i % 8]) for i in range(400)]
    pairs = Counter((a, b) for row in train for a, b in itertools.pairwise(row))
    firsts = Counter(a for row in train for a in row[:-1])

    def nats(rows):
        """Mean -log p of the continuations' tokens."""
        total = []
        for row in rows.tolist():
            for t in range(PREFIX, len(row)):
                bigram = (pairs[(row[t - 1], row[t])] + 0.05) / (firsts[row[t - 1]] + 0.05 * WORDS)
                here = [row[i + 1] for i in range(1, t - 1) if row[i - 1 : i + 1] == row[t - 2 : t]]
                trust = 1 - 0.5 ** len(here)
                total.append(-math.log((1 - trust) * bigram + trust * here.count(row[t]) / max(1, len(here))))
        return float(np.mean(total))

    def bag(rows):
        return torch.stack([torch.bincount(row, minlength=WORDS) for row in rows]).float()

    def scores(prefix, tokens):
        return Scores(
            float(seq_rep(tokens, 4).nanmean()),
            nats(torch.cat([prefix, tokens], dim=1)),
            float(coherence(bag(prefix), bag(tokens)).mean()),
            float(copied(prefix, tokens).mean()),
        )

    human = torch.tensor([text(topics[i % 8]) for i in range(40)])
    return scores, human[:, :PREFIX], human[:, PREFIX:]


class TestTheRule:
    def test_human_text_passes_and_each_control_is_rejected(self, world):
        scores, prefix, tokens = world
        human = scores(prefix, tokens)
        assert rejected_by(human, human) == []
        half = slice(0, 20), slice(20, 40)
        assert rejected_by(scores(prefix[half[0]], tokens[half[0]]), scores(prefix[half[1]], tokens[half[1]])) == []

        random = torch.randint(WORDS, tokens.shape, generator=torch.Generator().manual_seed(0))
        loop = tokens[:, :8].repeat(1, 13)[:, :TIME]
        copy = prefix.repeat(1, 2)
        assert {"improbable"} <= set(rejected_by(scores(prefix, random), human))
        assert {"repetitive", "too probable"} <= set(rejected_by(scores(prefix, loop), human))
        assert {"copied", "too probable"} <= set(rejected_by(scores(prefix, copy), human))
        once = torch.cat([prefix, tokens[:, : TIME - PREFIX]], dim=1)
        assert "copied" in rejected_by(scores(prefix, once), human), "a copy that does not repeat itself"
        assert seq_rep(random, 4).mean() <= human.seq_rep_4 + 0.1, "by repetition alone random tokens would do"

    @pytest.mark.parametrize(
        ("changed", "says"),
        [
            ({"seq_rep_4": 0.2}, "repetitive"),
            ({"nats": 4.5}, "improbable"),
            ({"nats": 0.5}, "too probable"),
            ({"copied": 0.5}, "copied"),
            ({"coherence": 0.1}, "incoherent"),
        ],
    )
    def test_each_check_rejects_alone(self, changed, says):
        human = Scores(0.01, 3.0, 0.5, 0.02)
        assert rejected_by(dataclasses.replace(human, **changed), human) == [says]

    def test_what_is_no_number_is_rejected_and_no_reference(self):
        human, nan = Scores(0.01, 3.0, 0.5, 0.02), math.nan
        broken = Scores(nan, nan, nan, nan)
        assert rejected_by(broken, human) == ["repetitive", "improbable", "too probable", "copied", "incoherent"]
        with pytest.raises(InputError, match="human row must be finite"):
            rejected_by(human, broken)
