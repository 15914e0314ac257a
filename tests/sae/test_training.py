"""Training learns, repeats itself to the bit, and resumes from any interruption."""

import math

import pytest
import torch

from trimtab.activations import ActivationCache
from trimtab.errors import InputError
from trimtab.sae import Arm, SAEConfig, squared_errors, sweep, train
from trimtab.sae import training as module

CONFIG = SAEConfig(
    latents=64, batch=128, budgets=(1, 2, 4), precision="float32", learning_rates=(1e-5, 3e-3), sweep_steps=60
)


def run(cache, arm="hierarchical-4", steps=60, **options):
    return train(Arm.parse(arm), CONFIG, cache, **{"learning_rate": 3e-3, "steps": steps, "seed": 0} | options)


def same(one, other):
    return all(
        torch.equal(a, b) for a, b in zip(one.sae.state_dict().values(), other.sae.state_dict().values(), strict=True)
    )


@pytest.fixture(scope="module")
def cache(caches):
    return ActivationCache(caches / "train", 0)


@pytest.mark.parametrize("arm", ["topk-4", "hierarchical-4"])
def test_it_learns_and_repeats_to_the_bit(cache, caches, arm):
    one = run(cache, arm, steps=300)
    val = ActivationCache(caches / "val", 0)
    fresh = squared_errors(run(cache, arm, steps=1, learning_rate=1e-9).sae, val, [4]).fvu()[4]
    assert squared_errors(one.sae, val, [4]).fvu()[4] < 0.7 * fresh
    assert same(one, run(cache, arm, steps=300))
    assert not same(one, run(cache, arm, steps=300, seed=1))


def test_topk_and_hierarchical_differ_in_what_they_are_good_for(cache, caches):
    val = ActivationCache(caches / "val", 0)
    topk, hier = (
        squared_errors(run(cache, arm, steps=400).sae, val, [1, 8]).fvu() for arm in ("topk-8", "hierarchical-8")
    )
    assert hier[1] < topk[1]


@pytest.mark.parametrize("stop", [1, 7, 33])
def test_an_interrupted_run_ends_with_the_same_weights(cache, tmp_path, monkeypatch, stop):
    whole = run(cache)
    monkeypatch.setattr(module, "SAVE_EVERY", 0.0)
    real, calls = module.OBJECTIVES["hierarchical"], []

    def failing(*arguments):
        calls.append(1)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setitem(module.OBJECTIVES, "hierarchical", failing)
    with pytest.raises(KeyboardInterrupt):
        run(cache, checkpoint=tmp_path / "c")
    taken = []
    monkeypatch.setitem(module.OBJECTIVES, "hierarchical", lambda *a: taken.append(1) or real(*a))
    resumed = run(cache, checkpoint=tmp_path / "c")
    assert len(taken) == 60 - stop, "the steps already taken were taken again"
    assert same(whole, resumed)
    assert whole.history == resumed.history


def test_a_checkpoint_of_another_run_is_not_taken_up(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAVE_EVERY", 0.0)
    run(cache, checkpoint=tmp_path / "c")
    assert same(run(cache, learning_rate=1e-3), run(cache, learning_rate=1e-3, checkpoint=tmp_path / "c"))


def test_the_sweep_prefers_the_rate_that_learns(cache, caches):
    losses = sweep(Arm("topk", 4), CONFIG, cache, ActivationCache(caches / "val", 0), seed=0)
    assert list(losses) == [1e-5, 3e-3]
    assert losses[3e-3] < losses[1e-5]


def test_the_schedule_rises_stays_and_falls_to_zero():
    rates = [module._rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[4:80] == [1.0] * 76
    assert rates[90] == pytest.approx(0.5)
    assert module._rate(100, 100) == 0


def test_a_diverging_run_stops_and_a_sweep_passes_over_it(cache, caches, monkeypatch):
    real, val = module.OBJECTIVES["topk"], ActivationCache(caches / "val", 0)
    monkeypatch.setitem(module.OBJECTIVES, "topk", lambda x, latents, sae: latents.values.sum() * math.inf)
    with pytest.raises(module.DivergedError, match=r"loss is not finite at step 20: lower lr 0\.003"):
        run(cache, "topk-4")
    with pytest.raises(InputError, match="diverges at every learning rate"):
        sweep(Arm("topk", 4), CONFIG, cache, val, seed=0)
    calls = []

    def first_diverges(*arguments):
        calls.append(1)
        return real(*arguments) * (math.inf if len(calls) <= 20 else 1)

    monkeypatch.setitem(module.OBJECTIVES, "topk", first_diverges)
    losses = sweep(Arm("topk", 4), CONFIG, cache, val, seed=0)
    assert losses[1e-5] == math.inf
    assert min(losses, key=losses.get) == 3e-3


def test_an_interrupted_sweep_takes_up_what_it_finished(cache, caches, tmp_path, monkeypatch):
    val = ActivationCache(caches / "val", 0)
    whole = sweep(Arm("topk", 4), CONFIG, cache, val, seed=0, checkpoints=tmp_path)
    monkeypatch.setitem(module.OBJECTIVES, "topk", None)
    assert sweep(Arm("topk", 4), CONFIG, cache, val, seed=0, checkpoints=tmp_path) == whole


def test_arms_that_do_not_fit_are_refused_before_training():
    with pytest.raises(InputError, match="more than the dictionary has latents"):
        Arm("topk", 65).check(CONFIG)
    with pytest.raises(InputError, match=r"k = 3 is not among the budgets \[1, 2, 4\]"):
        Arm("topk", 3).check(CONFIG)
    Arm("topk", 4).check(CONFIG)


@pytest.mark.parametrize("name", ["topk", "topk-", "topk-0", "relu-8", "topk--3"])
def test_arms_are_spelled(name):
    with pytest.raises(InputError, match="is not an arm: write topk-K or hierarchical-K"):
        Arm.parse(name)
    assert str(Arm.parse("topk-8")) == "topk-8"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be positive"),
        ({"learning_rates": ()}, "learning_rates must be positive"),
        ({"seeds": (1, 1)}, "seeds must be distinct"),
        ({"budgets": (1, 5000)}, "between 1 and latents"),
        ({"precision": "fp8"}, "precision must be"),
    ],
)
def test_configuration_is_checked(changes, message):
    with pytest.raises(InputError, match=message):
        SAEConfig(**changes)
