"""Verdicts follow from intervals, and intervals agree with other people's."""

import json

import numpy as np
import pytest
from scipy import stats

from trimtab.claims import Claim, Verdict, over_seeds, ratio_terms, seeds_and_groups, verdict_table
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
        (ABOVE, 0.0, 0.0, "inconclusive"),
        (ABOVE, 0.1, 0.1, "held"),
        (BELOW, 0.05, 0.05, "inconclusive"),
    ],
)
def test_outcomes(claim, low, high, outcome):
    verdict = claim.judge((low + high) / 2, low, high, "n = 1")
    assert verdict.outcome == outcome
    assert f"**{outcome}**" in verdict_table([verdict])


def test_an_effect_outside_its_interval_is_a_mistake():
    with pytest.raises(InputError, match="outside its interval"):
        ABOVE.judge(1.0, 2.0, 3.0, "n")


def test_a_verdict_says_all_that_was_stated_and_seen():
    claim = Claim("short", "A is more.", "mean of A", "above", 0.25, "shuffled A")
    said = {
        "name": "short",
        "text": "A is more.",
        "statistic": "mean of A",
        "rule": "above 0.25",
        "control": "shuffled A",
    }
    assert claim.judge(0.5, 0.4, 0.6, "4 seeds") == Verdict(
        **said, outcome="held", effect=0.5, low=0.4, high=0.6, n="4 seeds"
    )
    assert claim.judge(0.5, 0.4, np.inf, "4 seeds") == Verdict(
        **said, outcome="held", effect=0.5, low=0.4, high=None, n="4 seeds"
    )
    for diverged in ((np.nan, 0.0, 1.0), (np.inf, 0.0, np.inf), (0.5, np.nan, 1.0), (0.5, 0.0, np.nan)):
        assert claim.judge(*diverged, "4 seeds") == Verdict(
            **said, outcome="inconclusive", effect=None, low=None, high=None, n="4 seeds"
        )


def test_the_table_of_verdicts():
    claim = Claim("short", "A is more.", "mean of A", "below", 0.25, "shuffled A")
    verdicts = [
        claim.judge(0.12345, 0.1, 0.2, "4 seeds"),
        claim.judge(0.12345, -np.inf, 0.2, "4 seeds"),
        claim.judge(0.12345, 0.1, np.inf, "4 seeds"),
        claim.judge(np.nan, 0.0, 1.0, "4"),
    ]
    assert verdict_table(verdicts).splitlines() == [
        "| claim | verdict | statistic | effect | 95 % interval | held if | n | control |",
        "|---|---|---|---|---|---|---|---|",
        "| A is more. | **held** | mean of A | 0.123 | 0.1 to 0.2 | below 0.25 | 4 seeds | shuffled A |",
        "| A is more. | **held** | mean of A | 0.123 | unbounded | below 0.25 | 4 seeds | shuffled A |",
        "| A is more. | **inconclusive** | mean of A | 0.123 | unbounded | below 0.25 | 4 seeds | shuffled A |",
        "| A is more. | **inconclusive** | mean of A | none | unbounded | below 0.25 | 4 | shuffled A |",
    ]


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
    want = stats.ttest_1samp(values[:2], 0).confidence_interval(0.95)
    assert over_seeds(values[:2]) == pytest.approx((0.25, want.low, want.high))
    assert over_seeds([0.3]) == (0.3, -np.inf, np.inf)


def test_where_seeds_and_documents_vary_the_freedom_is_satterthwaites():
    values = np.random.default_rng(3).normal(size=(3, 1)) * 0.2 + np.random.default_rng(4).normal(size=(3, 20))
    effect, low, high = seeds_and_groups(weighted_mean(values), 3, 20)
    generator, draws = np.random.default_rng(0), []
    for _ in range(1000):
        chosen = generator.integers(20, size=20)
        draws.append(values[:, chosen].mean())
    seeds, documents = np.var(values.mean(axis=1), ddof=1) / 3, np.var(draws, ddof=1)
    freedom = (seeds + documents) ** 2 / (seeds**2 / 2 + documents**2 / 19)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(seeds + documents)
    assert (effect, low, high) == pytest.approx((values.mean(), values.mean() - half, values.mean() + half))
    two = seeds_and_groups(lambda index, weights: float(index), 2, 1)  # seeds alone vary, and there is one document
    assert two == pytest.approx(over_seeds([0.0, 1.0]))
    assert seeds_and_groups(lambda index, weights: 2.0, 3, 4) == (2.0, 2.0, 2.0)


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
