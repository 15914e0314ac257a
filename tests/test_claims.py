"""Verdicts follow from intervals, and intervals agree with other people's."""

import numpy as np
import pytest
from scipy import stats

from trimtab.claims import Claim, bootstrap, t_interval, verdict_table
from trimtab.errors import InputError

ABOVE = Claim("a", "more", "gain", "above", 0.0)
BELOW = Claim("b", "less", "loss", "below", 0.05)


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


def test_the_bootstrap_of_a_mean_matches_its_standard_error():
    """With one seed, resampling documents must give about mean +- 1.96 standard errors."""
    values = np.random.default_rng(1).normal(3.0, 2.0, size=(1, 400))
    effect, low, high = bootstrap(lambda w: float((values * w).sum() / w.sum()), 1, 400, seed=2)
    error = values.std(ddof=1) / 20
    assert effect == pytest.approx(values.mean())
    assert low == pytest.approx(effect - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(effect + 1.96 * error, abs=0.15 * error)


def test_seeds_widen_the_bootstrap_and_the_draw_repeats():
    values = np.array([[1.0] * 50, [2.0] * 50, [3.0] * 50])
    one, low, high = bootstrap(lambda w: float((values * w).sum() / w.sum()), 3, 50)
    assert (one, low, high) == bootstrap(lambda w: float((values * w).sum() / w.sum()), 3, 50)
    assert low == pytest.approx(1.0, abs=0.35)
    assert high == pytest.approx(3.0, abs=0.35)


def test_students_interval_agrees_with_scipy():
    values = [0.1, 0.4, 0.2, 0.7]
    mean, low, high = t_interval(values)
    want = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((np.mean(values), want.low, want.high))
    assert t_interval([0.3]) == (0.3, -np.inf, np.inf)
