"""Verdicts follow from intervals, and intervals agree with other people's."""

import json

import numpy as np
import pytest
from scipy import stats

from trimtab.claims import Claim, over_seeds, ratio_terms, seeds_and_groups, verdict_table
from trimtab.errors import InputError

ABOVE = Claim("a", "more", "gain", "above", 0.0, "none")
BELOW = Claim("b", "less", "loss", "below", 0.05, "none")


@pytest.mark.parametrize(
    ("claim", "low", "high", "outcome"),
    [
        (ABOVE, 0.1, 0.3, "held"),
        (ABOVE, -0.1, 0.3, "inconclusive"),
        (ABOVE, -0.3, -0.1, "not held"),
        (BELOW, 0.0, 0.04, "held"),
        (BELOW, 0.0, 0.06, "inconclusive"),
        (BELOW, 0.06, 0.07, "not held"),
        (ABOVE, 0.0, 0.1, "inconclusive"),
    ],
)
def test_outcomes(claim, low, high, outcome):
    verdict = claim.judge((low + high) / 2, low, high, "n = 1")
    assert verdict.outcome == outcome
    assert f"**{outcome}**" in verdict_table([verdict])


def test_an_effect_outside_its_interval_is_a_mistake():
    with pytest.raises(InputError, match="outside its interval"):
        ABOVE.judge(1.0, 2.0, 3.0, "n")


def weighted_mean(values):
    return lambda index, weights: float(values[index] @ weights / weights.sum())


def test_the_interval_has_its_coverage_when_seeds_vary_and_when_documents_do():
    """Simulated truth 0: about 95 % of intervals must contain it, whichever variation dominates."""
    generator = np.random.default_rng(0)
    for between_seeds, between_documents in ((1.0, 0.1), (0.05, 1.0)):
        hits = 0
        for _ in range(150):
            documents = generator.normal(0, between_documents, size=(1, 30))
            values = generator.normal(0, between_seeds, size=(4, 1)) + documents
            _, low, high = seeds_and_groups(weighted_mean(values), 4, 30)
            hits += low <= 0 <= high
        assert 0.90 <= hits / 150 < 1.0


def test_without_seed_variation_the_spread_is_that_of_documents():
    values = np.repeat(np.random.default_rng(1).normal(3.0, 2.0, size=(1, 400)), 3, axis=0)
    effect, low, high = seeds_and_groups(weighted_mean(values), 3, 400, seed=2)
    error = values[0].std(ddof=1) / 20
    assert effect == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 399) * error, rel=0.1)
    assert (effect, low, high) == seeds_and_groups(weighted_mean(values), 3, 400, seed=2)


def test_without_variation_of_documents_it_is_students_interval_over_seeds():
    by_seed = np.array([0.1, 0.4, 0.2])
    found = seeds_and_groups(weighted_mean(np.repeat(by_seed[:, None], 50, axis=1)), 3, 50)
    assert found == pytest.approx(over_seeds(by_seed.tolist()))


def test_one_seed_concludes_nothing():
    effect, low, high = seeds_and_groups(weighted_mean(np.ones((1, 5))), 1, 5)
    verdict = ABOVE.judge(effect, low, high, "1 seed")
    assert verdict.outcome == "inconclusive"
    assert "unbounded" in verdict_table([verdict])
    assert json.loads(json.dumps(vars(verdict), allow_nan=False))["low"] is None


def test_students_interval_agrees_with_scipy():
    values = [0.1, 0.4, 0.2, 0.7]
    mean, low, high = over_seeds(values)
    want = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((np.mean(values), want.low, want.high))
    assert over_seeds([0.3]) == (0.3, -np.inf, np.inf)


def test_terms_of_a_ratio_are_its_mean_and_its_derivatives():
    mine, whole = np.array([1.0, 3.0, 2.0]), np.array([4.0, 5.0, 3.0])
    terms = ratio_terms(mine.tolist(), whole.tolist())
    ratio = mine.sum() / whole.sum()
    assert terms.mean() == pytest.approx(ratio)
    for seed in range(3):
        weights = np.ones(3)
        weights[seed] += 1e-6
        moved = (mine @ weights / (whole @ weights) - ratio) / 1e-6
        assert terms[seed] - ratio == pytest.approx(3 * moved, rel=1e-4)
    assert ratio_terms([1.0, 2.0], [1.0, -1.0]).tolist() == [0.0, 0.0]
