"""Training learns, repeats itself to the bit, and resumes from any interruption."""

import dataclasses
import math

import pytest
import torch

from trimtab.activations import ActivationCache
from trimtab.errors import InputError
from trimtab.sae import SAE, Arm, Run, SAEConfig, squared_errors, sweep, train
from trimtab.sae import training as module

# 64 latents: the rule multiplies rates by 16.
CONFIG = SAEConfig(
    latents=64, batch=128, budgets=(1, 2, 4), precision="float32", learning_rates=(1e-6, 2e-4), sweep_steps=60
)


def run(cache, arm="hierarchical-4", steps=60, learning_rate=2e-4, config=CONFIG, **options):
    (trained,) = train([Run(Arm.parse(arm), learning_rate)], config, cache, **{"steps": steps, "seed": 0} | options)
    return trained


def same(one, other):
    return all(
        torch.equal(a, b) for a, b in zip(one.sae.state_dict().values(), other.sae.state_dict().values(), strict=True)
    )


@pytest.fixture(scope="module")
def cache(caches):
    return ActivationCache(caches / "train", 0)


@pytest.mark.parametrize(
    "arm",
    ["topk-4", "hierarchical-4", "hierarchical-pow2-4", "multitopk-4", "batchtopk-4", "matryoshka-4", "jumprelu-4"],
)
def test_it_learns_and_repeats_to_the_bit(cache, caches, arm):
    one = run(cache, arm, steps=300)
    val = ActivationCache(caches / "val", 0)
    fresh = squared_errors(run(cache, arm, steps=1, learning_rate=1e-10).sae, val, [4]).fvu()[4]
    assert squared_errors(one.sae, val, [4]).fvu()[4] < 0.7 * fresh
    assert same(one, run(cache, arm, steps=300))
    assert not same(one, run(cache, arm, steps=300, seed=1))


def test_topk_and_hierarchical_differ_in_what_they_are_good_for(cache, caches):
    val = ActivationCache(caches / "val", 0)
    topk, hier = (
        squared_errors(run(cache, arm, steps=400).sae, val, [1, 8]).fvu() for arm in ("topk-8", "hierarchical-8")
    )
    assert hier[1] < topk[1]


class Interruption:
    """Counts steps, and raises KeyboardInterrupt after `stop` of them."""

    def __init__(self, monkeypatch, stop=math.inf):
        self.steps, self.real = 0, module.Learner.step

        def step(learner, x, number):
            if self.steps >= stop:
                raise KeyboardInterrupt
            self.steps += 1
            return self.real(learner, x, number)

        monkeypatch.setattr(module.Learner, "step", step)


@pytest.mark.parametrize("stop", [1, 7, 33])
@pytest.mark.parametrize("arm", ["hierarchical-4", "batchtopk-4", "jumprelu-4"])
def test_an_interrupted_run_ends_with_the_same_weights(cache, tmp_path, monkeypatch, stop, arm):
    """Latents die within a few steps here, so that their idle times and the auxiliary loss are in the state too."""
    config = dataclasses.replace(CONFIG, dead_after=300)
    whole = run(cache, arm, config=config)
    monkeypatch.setattr(module, "SAVE_EVERY", 0.0)
    with monkeypatch.context() as patch:
        Interruption(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            run(cache, arm, config=config, checkpoint=tmp_path / "c")
    counted = Interruption(monkeypatch)
    resumed = run(cache, arm, config=config, checkpoint=tmp_path / "c")
    assert counted.steps == 60 - stop, "the steps already taken were taken again"
    assert same(whole, resumed)
    assert whole.history == resumed.history


def test_several_saes_on_one_stream_are_those_trained_alone(cache, tmp_path, monkeypatch):
    runs = [Run(Arm.parse(arm), rate) for arm in ("hierarchical-4", "topk-2") for rate in (1e-4, 2e-4)]
    passes = []
    real = ActivationCache.batches
    monkeypatch.setattr(ActivationCache, "batches", lambda *a, **o: passes.append(1) or real(*a, **o))
    together = train(runs, CONFIG, cache, steps=40, seed=0)
    assert len(passes) == 1
    for one, each in zip(runs, together, strict=True):
        assert same(each, run(cache, str(one.arm), 40, one.learning_rate))
    monkeypatch.setattr(module, "SAVE_EVERY", 0.0)
    with monkeypatch.context() as patch:
        Interruption(patch, 4 * 9 + 2)  # in the middle of a step's four learners
        with pytest.raises(KeyboardInterrupt):
            train(runs, CONFIG, cache, steps=40, seed=0, checkpoint=tmp_path / "c")
    resumed = train(runs, CONFIG, cache, steps=40, seed=0, checkpoint=tmp_path / "c")
    assert all(same(one, other) for one, other in zip(together, resumed, strict=True))


def test_the_auxiliary_loss_revives_dead_latents(cache, monkeypatch):
    """Half of the latents begin where no input reaches them."""
    real = SAE.__init__

    def buried(self, *arguments, **options):
        real(self, *arguments, **options)
        with torch.no_grad():
            self.b_enc[::2] = -1.0

    monkeypatch.setattr(SAE, "__init__", buried)
    alive = {}
    for weight in (0.0, 1.0):
        config = dataclasses.replace(CONFIG, dead_after=500, auxiliary=weight)
        trained = run(cache, "topk-4", steps=400, config=config, learning_rate=5e-4)
        alive[weight] = squared_errors(trained.sae, cache, [4]).alive()[4]
        assert trained.history[0][2] > 10, "nothing was dead: the test tests nothing"
    assert alive[1.0] > alive[0.0] + 0.1


def test_the_auxiliary_loss_is_its_definition():
    sae = SAE(12, 40, 4, generator=torch.Generator().manual_seed(0)).double()
    x = torch.randn(25, 12, dtype=torch.float64)
    latents = sae.encode(x, 4)
    dead = torch.arange(40) % 2 == 0
    residual = x - sae.decode(latents)
    acts = torch.relu(x @ sae.W_enc.T + sae.b_enc) * dead
    acts = torch.where(acts >= acts.topk(6, dim=1).values[:, -1:], acts, 0)  # d_model / 2 of them
    wanted = (residual - acts @ sae.W_dec).square().mean()
    torch.testing.assert_close(module.auxiliary_loss(x, latents, sae, dead), wanted)
    few = torch.arange(40) < 3  # fewer than d_model / 2: scaled down
    acts = torch.relu(x @ sae.W_enc.T + sae.b_enc) * few
    torch.testing.assert_close(
        module.auxiliary_loss(x, latents, sae, few), (residual - acts @ sae.W_dec).square().mean() / 2
    )


def test_no_auxiliary_loss_while_nothing_is_dead(cache, monkeypatch):
    monkeypatch.setattr(module, "auxiliary_loss", None)
    run(cache, steps=5)


def test_a_checkpoint_of_another_run_is_not_taken_up(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAVE_EVERY", 0.0)
    run(cache, checkpoint=tmp_path / "c")
    assert same(run(cache, learning_rate=1e-4), run(cache, learning_rate=1e-4, checkpoint=tmp_path / "c"))


def test_the_sweep_prefers_the_rate_that_learns(cache, caches, tmp_path, monkeypatch):
    val = ActivationCache(caches / "val", 0)
    losses = sweep(Arm("topk", 4), CONFIG, cache, val, seed=0, checkpoint=tmp_path / "c")
    assert list(losses) == [1e-6, 2e-4]
    assert losses[2e-4] < losses[1e-6]
    monkeypatch.setattr(module.Learner, "step", None)  # finished: taken up, not trained again
    assert sweep(Arm("topk", 4), CONFIG, cache, val, seed=0, checkpoint=tmp_path / "c") == losses


def test_the_rate_rises_falls_to_zero_and_shrinks_with_the_dictionary(cache):
    rates = [module.rate_factor(step, 100) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[4:20] == [1.0] * 16
    assert rates[60] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(1 / 80)
    peaks = []
    for latents in (2**10, 2**14):
        sae = SAE(cache.d_model, latents, 4)
        peaks.append(module.Learner(Arm("topk", 4), CONFIG, 1e-3, 10, sae).peak)
    assert peaks == pytest.approx([4e-3, 1e-3])


def test_a_diverging_run_stops_and_a_sweep_passes_over_it(cache, caches):
    val = ActivationCache(caches / "val", 0)
    hopeless = dataclasses.replace(CONFIG, learning_rates=(2e-4, 1e37))
    losses = sweep(Arm("topk", 4), hopeless, cache, val, seed=0)
    assert losses[1e37] == math.inf
    assert losses[2e-4] < 1
    trained = run(cache, "topk-4", learning_rate=1e37)
    assert trained.diverged
    assert trained.history[-1][0] == 20, "it went on after it was seen to diverge"
    with pytest.raises(InputError, match="diverges at every learning rate"):
        sweep(Arm("topk", 4), dataclasses.replace(CONFIG, learning_rates=(1e37,)), cache, val, seed=0)


def test_arms_that_do_not_fit_are_refused_before_training():
    with pytest.raises(InputError, match="more than the dictionary has latents"):
        Arm("topk", 65).check(CONFIG)
    with pytest.raises(InputError, match=r"k = 3 is not among the budgets \[1, 2, 4\]"):
        Arm("topk", 3).check(CONFIG)
    Arm("topk", 4).check(CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "`steps` must be a whole number, at least 1, not 0"),
        ({"learning_rates": ()}, "`learning_rates` must be a list"),
        ({"seeds": (1, 1)}, "`seeds` must be a list .*, each of them once"),
        ({"budgets": (1, 5000)}, "`budgets` must be at most `latents` = 2048"),
        ({"dead_after": 0}, "`dead_after` must be a whole number"),
        ({"auxiliary": -1.0}, "`auxiliary` must be a number of 0 or more"),
        ({"precision": "fp8"}, "`precision` must be one of bfloat16, float32"),
    ],
)
def test_configuration_is_checked(changes, message):
    with pytest.raises(InputError, match=message):
        SAEConfig(**changes)
