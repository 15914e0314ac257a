"""Arms, schedules and the training loop: the mix, resumption to the bit, updates that teach nothing, what is kept."""

import math

import pytest
import torch

from trimtab.errors import InputError
from trimtab.repetition import training
from trimtab.repetition.arms import OBJECTIVES, VECTORS, Arm, Mix
from trimtab.repetition.config import CompareConfig, RepetitionConfig, TrainingConfig
from trimtab.repetition.losses import accumulate
from trimtab.repetition.training import Step, train

CONFIG = TrainingConfig(updates=8, prefixes=3, prefix_tokens=5, tokens=12, n=2, readings=2, rows=2)
PREFIXES = torch.randint(258, (9, 5), generator=torch.Generator().manual_seed(0))
BLOCKS = torch.randint(258, (7, 16), generator=torch.Generator().manual_seed(1))


def validate(policy):
    return -accumulate(policy, BLOCKS[:2], 1, None)[1].mean().item()


def run(model_folder, arm="implicit", config=CONFIG, seed=0, rate=1e-2, **options):
    chosen = Arm(arm)
    policy = chosen.policy(str(model_folder), dtype="float32", device="cpu", seed=seed)
    trained = train(policy, chosen, PREFIXES, BLOCKS, validate, config, learning_rate=rate, seed=seed, **options)
    return policy, trained


@pytest.mark.parametrize("name", OBJECTIVES)
def test_kinds_come_as_often_as_their_shares_say(name):
    mix = OBJECTIVES[name]
    for updates in (1, 7, 24, 1000):
        kinds = mix.schedule(updates, seed=3)
        assert len(kinds) == updates
        assert all(abs(kinds.count(kind) - share * updates) < 1 for kind, share in mix.shares.items())
    assert mix.schedule(1000, 3) == mix.schedule(1000, 3)
    if len(mix.shares) > 1:
        assert mix.schedule(1000, 3) != mix.schedule(1000, 4)


def test_kinds_are_spread_evenly_over_a_run():
    """Whatever part of a run one looks at has its share of each, so that none has the high learning rates to itself."""
    for seed in range(20):
        kinds = OBJECTIVES["implicit"].schedule(48, seed)
        for n in range(1, 49):
            for kind, share in OBJECTIVES["implicit"].shares.items():
                assert abs(kinds[:n].count(kind) - share * n) < 2


def test_the_papers_mix_is_that_of_its_two_coins():
    shares = OBJECTIVES["implicit"].shares
    assert shares == {"policy": 0.25, "unlikelihood": 0.75 * 0.25, "likelihood": 0.75 * 0.75}
    kinds = OBJECTIVES["implicit"].schedule(24, 0)
    assert sorted(kinds.count(kind) for kind in shares) == [5, 6, 13]  # 4.5, 6 and 13.5


def test_a_mix_that_is_none_is_refused():
    with pytest.raises(InputError, match="together 1"):
        Mix({"likelihood": 0.5, "policy": 0.4})


@pytest.mark.parametrize("name", ["implicit-lora-0", "policy-vectors", "steering", "implicit-lora-2-steering"])
def test_an_arm_that_is_none_is_refused(name):
    with pytest.raises(InputError, match="not an arm"):
        Arm(name)


@pytest.mark.parametrize("rank", ["08", "8.0", "\u0668"])
def test_a_rank_has_one_spelling(rank):
    with pytest.raises(InputError, match="is not an arm: the nearest is implicit-lora-8, of implicit-lora-R with R"):
        Arm(f"implicit-lora-{rank}")


def test_what_each_arm_trains(model_folder, tiny_llama):
    size = sum(parameter.numel() for parameter in tiny_llama.parameters())
    for name, wanted in [("implicit", size), ("implicit-shuffled", size), ("implicit-steering", 3 * 16)]:
        policy = Arm(name).policy(str(model_folder), dtype="bfloat16", device="cpu")
        assert sum(tensor.numel() for tensor in policy.trained.values()) == wanted
        assert all(tensor.dtype == torch.float32 for tensor in policy.trained.values())
    lora = Arm("unlikelihood-lora-2").policy(str(model_folder), dtype="float32", device="cpu")
    # q, k, v, o and the three of the MLP: (in + out) x rank each, in three blocks.
    assert sum(tensor.numel() for tensor in lora.trained.values()) == 3 * 2 * (32 + 24 + 24 + 32 + 48 + 48 + 48)


@pytest.mark.parametrize("arm", ["likelihood", "unlikelihood-token", "unlikelihood", "policy", "implicit-joint"])
def test_every_objective_trains_and_its_history_is_whole(model_folder, arm):
    policy, trained = run(model_folder, arm)
    assert [update.update for update in trained.history] == list(range(1, 9))
    assert {update.kind for update in trained.history} <= set(OBJECTIVES[arm].shares)
    assert any(update.gradient > 0 for update in trained.history)
    for update in trained.history:
        assert math.isnan(update.reward) == update.kind.startswith("likelihood")
    assert [reading.update for reading in trained.readings] == [4, 8]
    assert validate(policy) == pytest.approx(trained.kept.nats, rel=1e-5)  # the best reading's parameters


@pytest.mark.parametrize("arm", ["implicit", "implicit-steering"])
def test_a_run_killed_anywhere_ends_with_the_same_parameters(model_folder, tmp_path, monkeypatch, arm):
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    whole, wanted = run(model_folder, arm)
    for killed_at in (1, 4, 6):
        checkpoint = tmp_path / f"{arm}-{killed_at}.safetensors"
        seen = []

        def counted(self, *arguments, original=Step._step, seen=seen, killed_at=killed_at, **options):
            if len(seen) == killed_at:
                raise KeyboardInterrupt
            seen.append(1)
            return original(self, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Step, "_step", counted)
            with pytest.raises(KeyboardInterrupt):
                run(model_folder, arm, checkpoint=checkpoint)
        again, history = run(model_folder, arm, checkpoint=checkpoint)
        assert all(torch.equal(again.trained[name], tensor) for name, tensor in whole.trained.items())
        assert [(u.kind, u.loss, u.gradient) for u in history.history] == [
            (u.kind, u.loss, u.gradient) for u in wanted.history
        ]
        finished, same = run(model_folder, arm, checkpoint=checkpoint)  # once more: nothing is trained
        assert repr(same.history) == repr(history.history)  # NaN is not equal to itself
        assert all(torch.equal(finished.trained[name], tensor) for name, tensor in whole.trained.items())


def test_a_checkpoint_of_another_run_is_ignored(model_folder, tmp_path):
    checkpoint = tmp_path / "run.safetensors"
    run(model_folder, "implicit-steering", checkpoint=checkpoint, identity="one text")
    _, trained = run(model_folder, "implicit-steering", checkpoint=checkpoint, identity="another")
    assert sum(update.update_s for update in trained.history) > 0
    assert trained.history[0].update == 1


def step(model_folder, monkeypatch, continuations, config=CONFIG, arm="implicit-steering"):
    policy = Arm(arm).policy(str(model_folder), dtype="float32", device="cpu")
    for parameter in policy.trained.values():
        parameter.requires_grad_()
    optimiser = torch.optim.AdamW(policy.trained.values(), lr=0.1)
    monkeypatch.setattr(Step, "_rollouts", lambda self, prefixes: continuations)
    return Step(policy, optimiser, config, seed=0, number=1), policy


def test_equal_rewards_take_no_step(model_folder, monkeypatch):
    """As late in greedy training: the policy gradient is exactly zero, and Adam's momentum must not move anything."""
    made, policy = step(model_folder, monkeypatch, torch.arange(3).view(3, 1).expand(3, 12).contiguous())
    seen = made.on_rollouts(PREFIXES[:3], "policy", shuffled=False)
    assert (seen.gradient, seen.reward) == (0.0, pytest.approx(1 / 11))
    assert seen.masked == pytest.approx(11 / 12)  # all but the first token
    assert not policy.trained[VECTORS].any()
    distinct = torch.arange(36).view(3, 12)
    made, policy = step(model_folder, monkeypatch, distinct)
    assert made.on_rollouts(PREFIXES[:3], "unlikelihood", shuffled=False).gradient == 0.0
    assert not policy.trained[VECTORS].any()


def test_the_policy_gradient_is_that_of_its_definition(model_folder, monkeypatch):
    """-3 / (B T) sum (R - mean R) log p by autograd through the steered model, as one pass."""
    continuations = torch.tensor([[7] * 12, [*range(12)], [1, 2, 3, 4, 5, 6] * 2])
    made, _ = step(model_folder, monkeypatch, continuations)
    rewards = torch.tensor([1 / 11, 1.0, 6 / 11])
    seen = made.on_rollouts(PREFIXES[:3], "policy", shuffled=False)
    assert seen.reward == pytest.approx(rewards.mean().item())
    fresh = Arm("implicit-steering").policy(str(model_folder), dtype="float32", device="cpu")
    vectors = fresh.trained[VECTORS].requires_grad_()
    rows = torch.cat([PREFIXES[:3], continuations], dim=1)
    places = torch.arange(16).expand(3, -1)
    hidden = fresh.hidden(rows[:, :-1], torch.ones_like(rows[:, :-1]), places)[:, 4:]
    log_p = fresh.logits(hidden).log_softmax(2).gather(2, continuations[..., None])[..., 0]
    (-3 * ((rewards - rewards.mean())[:, None] * log_p).sum() / 36).backward()
    assert seen.gradient == pytest.approx(vectors.grad.norm().item(), rel=1e-3)


@pytest.mark.parametrize("kind", ["policy", "unlikelihood", "both"])
def test_a_step_makes_the_worst_continuation_less_likely(model_folder, monkeypatch, kind):
    """And against the others, the one without repetition more likely."""
    continuations = torch.tensor([[7] * 12, [*range(12)], [1, 2, 3, 4, 5, 6] * 2])
    made, policy = step(model_folder, monkeypatch, continuations, arm="implicit")
    made.optimiser.param_groups[0]["lr"] = 1e-4
    rows = torch.cat([PREFIXES[:3], continuations], dim=1)
    before = accumulate(policy, rows, 5, None)[1].view(3, 12).sum(dim=1)
    made.on_rollouts(PREFIXES[:3], kind, shuffled=False)
    change = accumulate(policy, rows, 5, None)[1].view(3, 12).sum(dim=1) - before
    assert change[0] < 0
    assert change[1] - change[0] > 0


def test_shuffled_rewards_are_the_same_rewards(model_folder, monkeypatch):
    continuations = torch.tensor([[7] * 12, [*range(12)], [1, 2, 3, 4, 5, 6] * 2])
    norms = set()
    for number in range(1, 6):
        made, _ = step(model_folder, monkeypatch, continuations)
        made = Step(made.policy, made.optimiser, CONFIG, seed=0, number=number)
        seen = made.on_rollouts(PREFIXES[:3], "policy", shuffled=True)
        assert seen.reward == pytest.approx((1 / 11 + 1 + 6 / 11) / 3)
        norms.add(round(seen.gradient, 5))
    assert len(norms) > 1  # dealt out differently


def test_vectors_and_biases_do_not_decay(model_folder):
    policy = Arm("implicit").policy(str(model_folder), dtype="float32", device="cpu")
    decayed, spared = training._groups(policy.trained, 0.01)
    assert all(parameter.dim() == 2 for parameter in decayed["params"])
    assert all(parameter.dim() == 1 for parameter in spared["params"])
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
    assert [group["weight_decay"] for group in training._groups({VECTORS: torch.zeros(3, 4)}, 0.01)] == [0.0]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("updates", 0, "`updates` must be a whole number, at least 1, not 0"),
        ("readings", 9, "`readings` must be at most `updates` = 8"),
        ("n", 13, "`n` must be at most `tokens` = 12"),
        ("rollout_temperature", 0.7, "must be 0 .greedy. or 1"),
        ("weight_decay", -1.0, "`weight_decay` must be a number of 0 or more"),
        ("max_grad_norm", 0.0, "max_grad_norm"),
        ("learning_rates", (), "learning_rates"),
        ("seeds", (1, 1), "each of them once"),
        ("decoders", ("beam-2",), "greedy"),
        ("domains", (), "domains"),
        ("dtype", "float16", "one of bfloat16, float32"),
        ("test_prefixes", 0, "test_prefixes"),
        ("decoder_prefixes", 65, "at most `test_prefixes` = 64, not 65"),
        ("sentences", -1, "`sentences` must be a whole number, at least 0"),
    ],
)
def test_bad_parameters_are_named(field, value, message):
    with pytest.raises(InputError, match=message):
        RepetitionConfig(**{"updates": 8, "tokens": 12, "readings": 2, field: value})


def test_a_comparison_without_drawn_quality_is_refused():
    with pytest.raises(InputError, match=r"nucleus-0\.9"):
        CompareConfig(quality_decoders=("greedy",))


def test_a_run_that_falls_apart_keeps_what_it_had_before(model_folder):
    readings = iter([3.0, math.nan])
    chosen = Arm("implicit-steering")
    policy = chosen.policy(str(model_folder), dtype="float32", device="cpu")
    given = {"learning_rate": 1e-2, "seed": 0}
    trained = train(policy, chosen, PREFIXES, BLOCKS, lambda _: next(readings), CONFIG, **given)
    assert (trained.kept.update, [reading.nats for reading in trained.readings]) == (4, [3.0, math.inf])
    early, _ = run(model_folder, "implicit-steering", TrainingConfig(**{**vars(CONFIG), "readings": 1}))
    assert not torch.equal(policy.trained[VECTORS], early.trained[VECTORS])
    broken = train(policy, chosen, PREFIXES, BLOCKS, lambda _: math.nan, CONFIG, **given)
    assert math.isinf(broken.kept.nats)
