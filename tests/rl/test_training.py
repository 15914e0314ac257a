"""The loop: it learns, it resumes to the bit, its controls do not learn; every way of adapting the model."""

from dataclasses import replace

import pytest
import torch

from trimtab.errors import InputError
from trimtab.pretrained import load_model
from trimtab.rl import training
from trimtab.rl.advantages import ESTIMATORS
from trimtab.rl.config import RLConfig
from trimtab.rl.evaluation import answers, summary
from trimtab.rl.rollouts import rollout
from trimtab.rl.training import train
from trimtab.steering.arms import Arm

PROMPTS = [[5 + i, 6 + i, 7] for i in range(6)]
CONFIG = RLConfig(updates=12, prompts=3, group=6, max_new_tokens=3)
ARMS = ["steering", "steering-last", "steering-layer1", "steering-rank2", "lora-1", "lora-4", "full"]


@pytest.fixture(scope="module")
def model_folder(model_folder, tokenizer, tmp_path_factory):
    """The tiny model with a louder unembedding: at its initial scale nothing before it can move a probability much."""
    model = load_model(model_folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
    folder = tmp_path_factory.mktemp("loud")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def wanted(_, drawn):
    """1 where the first token is among a quarter of the vocabulary: a task with a steady signal."""
    return (drawn.completions[:, :, 0] % 4 == 1).float()


def built(name, folder, dtype="float32", **options):
    return Arm(name).policy(str(folder), dtype=dtype, device="cpu", **options)


def trained(name, folder, rate, config=CONFIG, reward=wanted, **options):
    made = built(name, folder)
    history = train(made.policy, PROMPTS, reward, config, learning_rate=rate, seed=0, end=[1], **options)
    return made, history


@torch.no_grad()
def expected_reward(policy):
    """The mean of `wanted` under a policy, exactly: one pass, no draws."""
    ids = torch.tensor(PROMPTS)
    hidden = policy.hidden(ids, torch.ones_like(ids), torch.arange(3).expand(len(ids), -1))
    return policy.logits(hidden[:, -1]).float().softmax(1)[:, 1::4].sum(1).mean().item()


RATES = {"full": 0.02, "lora-1": 0.1, "lora-4": 0.1}


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_learns_and_starts_as_the_base(name, model_folder):
    made = built(name, model_folder)
    base = load_model(model_folder)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        hidden = made.policy.hidden(ids, torch.ones_like(ids), torch.arange(3)[None])
        torch.testing.assert_close(hidden, base.model(ids).last_hidden_state)
    config = replace(CONFIG, updates=25, max_new_tokens=1)
    before = expected_reward(made.policy)
    made, history = trained(name, model_folder, RATES.get(name, 0.3), config)
    after = expected_reward(made.policy)
    assert after > before + 0.2, f"{name}: {before:.2f} to {after:.2f}"
    assert history[-1].norm > 0
    held, tensors = made.policy.training_bytes, len(made.policy.trained)
    assert held["trained"] == held["gradients"] == 4 * made.parameters, "in fp32"
    assert held["optimiser"] == 8 * made.parameters + 4 * tensors, "two moments, and a count of steps a tensor"


def test_parameter_counts(model_folder):
    counts = {name: built(name, model_folder).parameters for name in ARMS}
    assert counts["steering"] == 3 * 16
    assert counts["steering-last"] == counts["steering-layer1"] == 16
    assert counts["steering-rank2"] == 3 * 2 + 2 * 16
    assert counts["lora-4"] == 4 * counts["lora-1"] == 4 * 3 * (16 + 32)
    assert counts["full"] == sum(p.numel() for p in load_model(model_folder).parameters())


@pytest.mark.parametrize("name", ["steering", "lora-1", "full"])
def test_killed_and_resumed_it_ends_with_the_same_bits(name, model_folder, tmp_path, monkeypatch):
    whole, history = trained(name, model_folder, 0.05)
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    calls = []

    def interrupted(chosen, drawn):
        calls.append(chosen)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return wanted(chosen, drawn)

    with pytest.raises(KeyboardInterrupt):
        trained(name, model_folder, 0.05, reward=interrupted, checkpoint=tmp_path / "c")
    resumed, again = trained(name, model_folder, 0.05, reward=interrupted, checkpoint=tmp_path / "c")
    timeless = {"rollout_s": 0.0, "update_s": 0.0}
    assert [replace(u, **timeless) for u in again] == [replace(u, **timeless) for u in history]
    for one, other in zip(whole.policy.trained.values(), resumed.policy.trained.values(), strict=True):
        assert torch.equal(one, other)


def test_another_run_ignores_the_checkpoint(model_folder, tmp_path):
    trained("steering", model_folder, 0.05, checkpoint=tmp_path / "c")
    _, history = trained("steering", model_folder, 0.05, checkpoint=tmp_path / "c", identity="another task")
    assert len(history) == CONFIG.updates
    assert history[0].rollout_s > 0


ESTIMATES = [(name, {"estimator": name}) for name in ESTIMATORS] + [("rloo", {"steps_per_batch": 2})]


@pytest.mark.parametrize(("name", "options"), ESTIMATES)
def test_equal_rewards_move_nothing_even_after_others(name, options, model_folder, tmp_path, monkeypatch):
    """Neither rounding nor momentum: six updates that teach, then six that do not, resumed where they begin."""
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    config, kept = replace(CONFIG, **options), {"checkpoint": tmp_path / "c"}
    still, _ = trained("steering", model_folder, 0.3, config, lambda _, drawn: torch.full((3, 6), 0.35))
    assert not any(parameter.any() for parameter in still.policy.trained.values())
    calls = []

    def fading(chosen, drawn):
        calls.append(chosen)
        return wanted(chosen, drawn) if len(calls) <= 6 else torch.full((3, 6), 0.35)

    half, _ = trained("steering", model_folder, 0.05, config, fading, until=6, **kept)
    whole, history = trained("steering", model_folder, 0.05, config, fading, **kept)
    assert half.policy.trained["weight"].any()
    assert torch.equal(half.policy.trained["weight"], whole.policy.trained["weight"])
    assert [update.informative for update in history[6:]] == [0.0] * 6


def test_rewards_that_are_no_numbers_are_left_out_and_counted(model_folder):
    def odd(_, drawn):
        rewards = wanted(_, drawn)
        rewards[0, 0], rewards[1, 2], rewards[2, :] = torch.nan, torch.inf, torch.nan
        return rewards

    made, history = trained("steering", model_folder, 0.3, reward=odd)
    assert made.policy.trained["weight"].isfinite().all()
    assert made.policy.trained["weight"].any()
    assert {update.unjudged for update in history} == {8}
    assert all(0 <= update.reward <= 1 for update in history)
    none, history = trained("steering", model_folder, 0.3, reward=lambda _, drawn: torch.full((3, 6), torch.nan))
    assert not none.policy.trained["weight"].any()
    assert history[-1].unjudged == 18


FORMS = {
    "lists": lambda r: r.tolist(), "integers": lambda r: r.long(), "booleans": lambda r: r.bool(),
    "an array": lambda r: r.numpy(), "fp64": lambda r: r.double(), "bf16": lambda r: r.bfloat16(),
    "with a gradient": lambda r: r.requires_grad_(), "lists of tensors": lambda r: [list(row.tolist()) for row in r],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_rewards_may_come_in_any_form(form, model_folder):
    config = replace(CONFIG, updates=2)
    expected, _ = trained("steering", model_folder, 0.3, config)
    found, _ = trained("steering", model_folder, 0.3, config, lambda _, drawn: FORMS[form](wanted(_, drawn)))
    assert torch.equal(expected.policy.trained["weight"], found.policy.trained["weight"])


@pytest.mark.parametrize(
    "given", [None, 1.0, [1.0] * 3, [[1.0] * 5] * 3, [[1.0] * 6] * 2, [["a"] * 6] * 3, [[1.0], [1.0, 2.0]], "0"]
)
def test_rewards_of_another_shape_are_refused(given, model_folder):
    with pytest.raises(InputError, match=r"must return a number for each of \[3, 6\] completions"):
        trained("steering", model_folder, 0.3, reward=lambda *_: given)


def test_full_tuning_in_bf16_keeps_small_updates(model_folder):
    """Steps far below bf16's resolution add up on the master copies, and reach the model."""
    made = built("full", model_folder, dtype="bfloat16")
    weight = made.policy.weights["model.norm.weight"]
    assert weight.dtype == torch.bfloat16
    assert weight[0].item() == 1.0
    for _ in range(40):
        with torch.no_grad():
            made.policy.trained["model.norm.weight"].add_(1e-3)
        made.policy.publish()
    assert weight[0].item() == pytest.approx(1.04, abs=0.004)


def test_the_same_seed_draws_the_same_for_any_arm(model_folder):
    draws = []
    for name in ("steering", "lora-1"):
        policy = built(name, model_folder).policy
        generator = torch.Generator().manual_seed(0)
        got = rollout(policy, PROMPTS, group=2, max_new_tokens=4, temperature=1.0, end=[1], generator=generator)
        draws.append(got.completions)
    assert torch.equal(*draws)


@pytest.mark.parametrize("name", ["", "steer", "lora", "lora-x", "full-1", "steering-layer"])
def test_a_name_that_is_no_arm_is_refused(name):
    with pytest.raises(InputError, match="is not an arm"):
        Arm(name)


@pytest.mark.parametrize("name", ["steering-layer03", "steering-layer\u0663", "steering-layer3.0"])
def test_a_layer_has_one_spelling(name):
    with pytest.raises(InputError, match="is not an arm: the nearest is steering-layer3, of steering-layerN with N"):
        Arm(name)


def test_answers_are_judged_item_by_item(model_folder, tokenizer):
    policy = built("steering", model_folder).policy
    judged = []

    def judge(item, text):
        judged.append((item, text))
        return float(item % 2 == 0)

    options = {"samples": 4, "max_new_tokens": 3, "temperature": 1.0, "end": range(258), "seed": 0, "batch": 4}
    table = answers(policy, PROMPTS, judge, tokenizer.decode, **options)
    assert table.height == len(PROMPTS) * 5 == len(judged)
    assert table.filter(sample=0)["item"].to_list() == list(range(6))
    found = summary(table)
    assert found["greedy"] == found["mean"] == found["pass@1"] == found["pass@4"] == 0.5
    assert "pass@8" not in found
    cut_off = answers(policy, PROMPTS, judge, tokenizer.decode, **(options | {"end": [300]}))
    assert cut_off["correct"].sum() == cut_off["finished"].sum() == 0
    assert table.equals(answers(policy, PROMPTS, judge, tokenizer.decode, **options))
