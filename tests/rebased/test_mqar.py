"""The generator: every pair asked once, labels only there, and zoology's statistics."""

import numpy as np
import pytest
import torch
from scipy import stats

from trimtab.errors import InputError
from trimtab.rebased.mqar import IGNORED, POWER, recall

ROWS, TIME, PAIRS, VOCABULARY = 400, 64, 8, 128


@pytest.fixture(scope="module")
def batch():
    return recall(ROWS, TIME, PAIRS, VOCABULARY, torch.Generator().manual_seed(0))


def test_every_pair_is_told_once_and_asked_once_and_the_label_is_its_value(batch):
    for row, labels in zip(batch.inputs.tolist(), batch.labels.tolist(), strict=True):
        told = dict(zip(row[: 2 * PAIRS : 2], row[1 : 2 * PAIRS : 2], strict=True))
        assert len(told) == len(set(told.values())) == PAIRS
        assert all(1 <= key < VOCABULARY // 2 <= value < VOCABULARY for key, value in told.items())
        asked = {t: row[t] for t in range(TIME) if labels[t] != IGNORED}
        assert sorted(asked.values()) == sorted(told)
        assert all(labels[t] == told[key] for t, key in asked.items())
        assert all(row[t] == 0 for t in range(2 * PAIRS, TIME) if t not in asked)
        assert all(t >= 2 * PAIRS and t % 2 == 0 for t in asked)


def test_gaps_follow_the_power_law_of_zoologys_generator():
    """Against numpy's own drawing without replacement, as zoology does it."""
    places, generator = (TIME - 2 * PAIRS) // 2, np.random.default_rng(0)
    weights = POWER * np.arange(1, places + 1) ** (POWER - 1)
    theirs = np.concatenate(
        [generator.choice(places, PAIRS, replace=False, p=weights / weights.sum()) for _ in range(4 * ROWS)]
    )
    ours = recall(4 * ROWS, TIME, PAIRS, VOCABULARY, torch.Generator().manual_seed(1)).labels
    at = ((ours != IGNORED).nonzero()[:, 1] - 2 * PAIRS) // 2
    counts = [np.bincount(x, minlength=places) for x in (theirs, at.numpy())]
    assert stats.chi2_contingency(np.stack(counts)).pvalue > 0.001
    assert counts[1][0] > 2 * counts[1][-1]  # near places are asked first


def test_keys_and_values_are_uniform(batch):
    for ids, low, high in ((batch.inputs[:, : 2 * PAIRS : 2], 1, 64), (batch.inputs[:, 1 : 2 * PAIRS : 2], 64, 128)):
        counts = np.bincount(ids.flatten(), minlength=high)[low:high]
        assert stats.chisquare(counts).pvalue > 0.001


def test_equal_seeds_give_equal_rows_and_others_do_not(batch):
    again = recall(ROWS, TIME, PAIRS, VOCABULARY, torch.Generator().manual_seed(0))
    other = recall(ROWS, TIME, PAIRS, VOCABULARY, torch.Generator().manual_seed(1))
    assert torch.equal(again.inputs, batch.inputs)
    assert not torch.equal(other.inputs, batch.inputs)


def test_pairs_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="at least 68 tokens"):
        recall(1, 64, 17, 128, torch.Generator())
    with pytest.raises(InputError, match="`vocabulary` of at least 34"):
        recall(1, 64, 16, 32, torch.Generator())
