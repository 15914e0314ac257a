"""Rollouts, advantages and the policy gradient against definitions: whole passes, enumeration, finite differences."""

import copy
import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from trimtab.epochs import batch_of
from trimtab.errors import InputError
from trimtab.interventions import wrap
from trimtab.rl import advantages as adv
from trimtab.rl.adapters import inject_lora
from trimtab.rl.config import RLConfig
from trimtab.rl.gradient import Terms, accumulate, pack, surrogate, token_log_probs
from trimtab.rl.policy import Policy
from trimtab.rl.rollouts import Rollouts, draw, rollout
from trimtab.rl.training import optimise
from trimtab.steering.vectors import SteeringVectors

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
END = 1


@pytest.fixture
def steered(tiny_llama, tokenizer):
    """(policy, vectors): the tiny model with vectors that are not zero."""
    for parameter in tiny_llama.parameters():
        parameter.requires_grad_(False)
    vectors = SteeringVectors([0, 1, 2], 16)
    with torch.no_grad():
        vectors.weight.normal_(generator=torch.Generator().manual_seed(0))
    wrapped = wrap(tiny_llama, tokenizer)
    yield Policy(vectors.applied_to(wrapped), dict(vectors.named_parameters()), wrapped), vectors
    for parameter in tiny_llama.parameters():
        parameter.requires_grad_(True)


def drawn(policy, group=3, tokens=6, temperature=0.7, end=(END,), seed=0, prompts=PROMPTS):
    generator = torch.Generator().manual_seed(seed)
    return rollout(
        policy, prompts, group=group, max_new_tokens=tokens, temperature=temperature, end=end, generator=generator
    )


def log_probs_one_by_one(policy, rollouts, temperature):
    """log p of every generated token, each completion in a pass of its own, without padding or cache."""
    found = torch.zeros(rollouts.mask.shape)
    for p, m in np.ndindex(*rollouts.finished.shape):
        prompt, generated = rollouts.prompts[p], rollouts.completion(p, m, end=True)
        ids = torch.tensor([prompt + generated])
        hidden = policy.hidden(ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None])
        logits = policy.logits(hidden)[0, len(prompt) - 1 : -1] / temperature
        found = found.index_put(
            (torch.tensor(p), torch.tensor(m), torch.arange(len(generated))),
            logits.log_softmax(1)[range(len(generated)), generated],
        )
    return found


class TestRollouts:
    @pytest.mark.parametrize(
        "prompts",
        [PROMPTS, [[3, 4, 5, 6, 7], [3, 4, 8], [3, 4, 9, 10]], [[3, 4, 5], [3, 4, 5, 6]], [[3, 4]] * 2, [[3, 4, 5]]],
        ids=["nothing in common", "a common beginning", "one begins another", "twice the same", "alone"],
    )
    def test_probabilities_are_those_of_a_pass_without_cache_or_padding(self, steered, prompts):
        policy, _ = steered
        # Half of all tokens end a completion: rows leave the batch step by step, a block of them at a time.
        got = drawn(policy, group=48, tokens=10, end=range(0, 258, 2), prompts=prompts)
        with torch.no_grad():
            expected = log_probs_one_by_one(policy, got, 0.7)
        torch.testing.assert_close(got.log_probs, torch.where(got.mask, expected, 0), atol=1e-5, rtol=1e-5)
        lengths = got.mask.sum(2)
        assert lengths.min() < 3 < lengths.max(), "completions should differ in length"

    def test_masks_stop_at_the_end(self, steered):
        policy, _ = steered
        ends = set(range(0, 258, 2))
        got = drawn(policy, group=8, tokens=10, end=sorted(ends))
        for p, m in np.ndindex(*got.finished.shape):
            ids = got.completion(p, m, end=True)
            assert all(token not in ends for token in ids[:-1])
            assert (ids[-1] in ends) == bool(got.finished[p, m])
            assert bool(got.finished[p, m]) or len(ids) == got.mask.shape[2]
            assert got.mask[p, m].tolist() == [t < len(ids) for t in range(got.mask.shape[2])]
            assert got.completion(p, m) == (ids[:-1] if got.finished[p, m] else ids)

    def test_greedy_is_the_models_own_generate(self, steered, tiny_llama, tokenizer):
        policy = Policy(wrap(tiny_llama, tokenizer), {})
        got = drawn(policy, group=2, temperature=0.0)
        for p, prompt in enumerate(PROMPTS):
            ids = torch.tensor([prompt])
            whole = tiny_llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
            expected = whole[0, len(prompt) :].tolist()
            assert got.completion(p, 0, end=True) == got.completion(p, 1, end=True) == expected

    def test_draws_follow_the_distribution(self, steered):
        policy, _ = steered
        got = drawn(policy, group=4000, tokens=1, temperature=1.0)
        ids = torch.tensor([PROMPTS[0]])
        with torch.no_grad():
            hidden = policy.hidden(ids, torch.ones_like(ids), torch.arange(4)[None])
            p = policy.logits(hidden)[0, -1].softmax(0)
        seen = torch.bincount(got.completions[0, :, 0], minlength=258) / 4000
        top = p.topk(20).indices
        assert (seen[top] - p[top]).abs().max() < 5 * math.sqrt(0.25 / 4000)
        entropy = -(p * p.log()).sum()
        torch.testing.assert_close(got.entropy[0, 0, 0], entropy, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("vocabulary", [5, 256, 1000])
    def test_inversion_takes_each_index_as_often_as_it_should(self, vocabulary):
        probs = torch.rand(vocabulary, generator=torch.Generator().manual_seed(1)) ** 8
        probs[::3] = 0
        probs /= probs.sum()
        n = 20_000
        got = draw(probs.expand(n, -1), torch.Generator().manual_seed(0), block=64)[:, 0]
        seen = torch.bincount(got, minlength=vocabulary)
        assert seen[probs == 0].sum() == 0
        expected = n * probs[probs > 5 / n].numpy()
        counted = seen[probs > 5 / n].numpy()
        statistic = ((counted - expected) ** 2 / expected).sum()
        assert scipy.stats.chi2.sf(statistic, len(expected) - 1) > 1e-4

    def test_finished_rows_leave_in_whole_blocks(self, steered, monkeypatch):
        policy, _ = steered
        sizes, hidden = [], policy.hidden
        monkeypatch.setattr(policy, "hidden", lambda ids, *rest: (sizes.append(len(ids)), hidden(ids, *rest))[1])
        got = drawn(policy, group=40, tokens=10, end=range(0, 258, 2))
        going = [int(got.mask[:, :, t].sum()) for t in range(1, got.mask.shape[2])]
        assert sizes[-len(going) :] == [min(40 * len(PROMPTS), -(-n // 16) * 16) for n in going]
        assert len(set(sizes)) > 3

    def test_a_seed_decides(self, steered):
        policy, _ = steered
        assert torch.equal(drawn(policy).completions, drawn(policy).completions)
        assert not torch.equal(drawn(policy).completions, drawn(policy, seed=1).completions)


class TestGradient:
    def test_packed_log_probs_are_those_of_single_passes(self, steered):
        policy, _ = steered
        got = drawn(policy, end=range(0, 258, 2))
        packed = pack(got, [2, 0])
        with torch.no_grad():
            expected = log_probs_one_by_one(policy, got, 0.7)
        found = token_log_probs(policy, packed, 0.7)
        assert len(found) == got.mask[[0, 2]].sum()
        torch.testing.assert_close(found, expected[tuple(packed.source.T)], atol=1e-5, rtol=1e-5)

    def test_on_policy_the_ratio_is_one(self, steered):
        """The engine that draws and the one that learns agree, at a temperature other than 1 too."""
        policy, _ = steered
        got = drawn(policy)
        packed = pack(got, [0, 1, 2])
        ratio = (token_log_probs(policy, packed, 0.7) - got.log_probs[tuple(packed.source.T)]).exp()
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("rows", [1, 2, 8])
    def test_the_gradient_is_that_of_the_written_loss(self, steered, rows, monkeypatch):
        policy, vectors = steered
        monkeypatch.setattr("trimtab.rl.gradient.HEAD_TOKENS", 5)
        got = drawn(policy, end=range(0, 258, 2))
        weights = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
        weights[1] = 0  # a group that teaches nothing
        loss = -(weights[:, :, None] * log_probs_one_by_one(policy, got, 0.7)).sum() / got.mask.sum()
        (expected,) = torch.autograd.grad(loss, vectors.weight)
        seen = []
        monkeypatch.setattr("trimtab.rl.training.pack", lambda *a: seen.append(a[1]) or pack(*a))
        optimiser = torch.optim.SGD(vectors.parameters(), lr=0.0)
        norm = optimise(policy, optimiser, got, weights, RLConfig(temperature=0.7, max_grad_norm=1e9, rows=rows))
        torch.testing.assert_close(vectors.weight.grad, expected, atol=1e-6, rtol=1e-4)
        assert norm == pytest.approx(expected.norm().item(), rel=1e-4)
        assert sorted(itertools.chain(*seen)) == [0, 2], "the silent group should be left out"
        assert (vectors.weight.grad.norm(dim=1) > 0).all(), "every steered layer learns"

    def test_a_batch_that_teaches_nothing_has_no_gradient(self, steered):
        policy, vectors = steered
        before = vectors.weight.detach().clone()
        optimiser = torch.optim.Adam(vectors.parameters(), lr=1.0)
        assert optimise(policy, optimiser, drawn(policy), torch.zeros(3, 3), RLConfig(temperature=0.7)) == 0
        assert torch.equal(vectors.weight.detach(), before)

    def test_rloo_is_an_unbiased_gradient(self):
        """Over a toy vocabulary, all groups of three enumerated: E[estimate] = gradient of the expected reward."""
        theta = torch.tensor([0.3, -0.2, 0.9, 0.1], dtype=torch.float64, requires_grad=True)
        reward = torch.tensor([1.0, 0.0, 0.5, 0.0], dtype=torch.float64)
        expected = torch.autograd.grad((theta.softmax(0) * reward).sum(), theta)[0]
        estimate = torch.zeros(4, dtype=torch.float64)
        for group in itertools.product(range(4), repeat=3):
            chosen = torch.tensor(group)
            log_p = theta.log_softmax(0)[chosen]
            a = adv.rloo(reward[chosen][None])[0]
            estimate += log_p.sum().exp().detach() * torch.autograd.grad((a * log_p).sum() / 3, theta)[0]
        torch.testing.assert_close(estimate, expected)

    def test_clipping_and_kl_by_hand(self):
        log_probs = torch.tensor([0.5, 0.5, -1.0, -1.0]).log_softmax(0).requires_grad_()
        old = log_probs.detach() - torch.tensor([0.5, -0.5, 0.5, 0.01])  # ratios 1.65, 0.61, 1.65, 1.01
        a = torch.tensor([1.0, 1.0, -1.0, 2.0])
        ratio = (log_probs.detach() - old).exp()
        found = surrogate(Terms(log_probs, a, old), 0.2, 0.0)
        torch.testing.assert_close(found.detach(), -torch.tensor([1.2, ratio[1], -ratio[2], 2 * ratio[3]]))
        reference = log_probs.detach() + torch.tensor([0.0, 0.3, -0.3, 0.0])
        extra = surrogate(Terms(log_probs, a, None, reference), 0.2, 2.0) - surrogate(Terms(log_probs, a), 0.2, 0.0)
        r = (reference - log_probs.detach()).exp()
        torch.testing.assert_close(extra.detach(), 2 * (r - 1 - r.log()))

    def test_the_kl_penalty_pulls_to_the_base(self, steered):
        """Without rewards, the gradient of the penalty is that of its written form, and zero vectors have none."""
        policy, vectors = steered
        got = drawn(policy)
        with torch.no_grad():
            base = log_probs_one_by_one(Policy(policy.base, {}), got, 0.7)
        lp = log_probs_one_by_one(policy, got, 0.7)
        loss = torch.where(got.mask, (base - lp).exp() - 1 - (base - lp), 0).sum() / got.mask.sum()
        (expected,) = torch.autograd.grad(0.3 * loss, vectors.weight)
        config = RLConfig(temperature=0.7, max_grad_norm=1e9, kl=0.3)
        optimise(policy, torch.optim.SGD(vectors.parameters(), lr=0.0), got, torch.zeros(3, 3), config)
        torch.testing.assert_close(vectors.weight.grad, expected, atol=1e-6, rtol=1e-4)
        with torch.no_grad():
            vectors.weight.zero_()
        assert optimise(policy, torch.optim.SGD(vectors.parameters(), lr=0.0), got, torch.zeros(3, 3), config) < 1e-6

    def test_a_penalty_without_a_model_to_go_back_to_is_refused(self, tiny_llama, tokenizer):
        """Adapters change the model itself: taken to itself, the penalty would be 0 without a word."""
        wrapped = wrap(copy.deepcopy(tiny_llama), tokenizer)
        policy = Policy(wrapped, inject_lora(wrapped, ["down_proj"], 1, seed=0))
        config = RLConfig(kl=0.1)
        with pytest.raises(InputError, match="give a frozen copy as `base`"):
            optimise(policy, torch.optim.SGD(policy.trained.values(), lr=0.0), drawn(policy), torch.zeros(3, 3), config)

    def test_several_steps_on_a_batch_start_from_ratio_one(self, steered):
        policy, vectors = steered
        got, weights = drawn(policy), torch.randn(3, 3, generator=torch.Generator().manual_seed(2))
        config = RLConfig(temperature=0.7, max_grad_norm=1e9)
        once = optimise(policy, torch.optim.SGD(vectors.parameters(), lr=0.0), got, weights, config)
        twice = RLConfig(temperature=0.7, max_grad_norm=1e9, steps_per_batch=2)
        assert optimise(policy, torch.optim.SGD(vectors.parameters(), lr=0.0), got, weights, twice) == pytest.approx(
            once
        )

    def test_accumulate_returns_the_loss(self, steered):
        policy, _ = steered
        packed = pack(drawn(policy), [0])
        value = accumulate(policy, packed, 0.7, lambda log_probs, _: log_probs.sum())
        assert value == pytest.approx(token_log_probs(policy, packed, 0.7).sum().item(), rel=1e-5)


class TestAdvantages:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])

    def test_by_hand(self):
        torch.testing.assert_close(adv.rloo(self.rewards)[2], torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3]))
        torch.testing.assert_close(adv.grpo_no_std(self.rewards)[2], torch.tensor([0.75, -0.25, -0.25, -0.25]))
        torch.testing.assert_close(adv.grpo(self.rewards)[2], torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-3, rtol=0)
        torch.testing.assert_close(adv.reinforce_with_baseline(self.rewards, 0.25)[0, :2], torch.tensor([0.75, -0.25]))
        assert torch.equal(adv.reinforce(self.rewards), self.rewards)
        assert adv.informative(self.rewards).item() == pytest.approx(2 / 3)
        for centred in (adv.rloo, adv.grpo, adv.grpo_no_std):
            assert not centred(self.rewards)[1].any()

    @pytest.mark.parametrize("name", adv.ESTIMATORS)
    @pytest.mark.parametrize("value", [0.35, 0.1, 1 / 3, -7.3, 1e8, 1e-30])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equal_rewards_have_no_advantage_to_the_bit(self, name, value, dtype):
        for baseline in (0.0, 0.2, value):
            assert not adv.ESTIMATORS[name](torch.full((3, 7), value, dtype=dtype), baseline).any()

    @pytest.mark.parametrize("name", adv.ESTIMATORS)
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_completion_that_nobody_could_judge_is_left_out(self, name, value):
        """The others are compared as if it had not been drawn; a group with one judge's word teaches nothing."""
        rewards = torch.tensor([[1.0, value, 0.25, 0.0], [value, 0.5, 0.5, 0.5], [value, value, value, 1.0]])
        found = adv.ESTIMATORS[name](rewards, 0.125)
        assert found.isfinite().all()
        assert not found[~rewards.isfinite()].any()
        torch.testing.assert_close(found[0, [0, 2, 3]], adv.ESTIMATORS[name](rewards[:1, [0, 2, 3]], 0.125)[0])
        if "reinforce" not in name:
            assert not found[1:].any()

    @pytest.mark.parametrize("k", [1, 2, 4])
    def test_pass_at_k_is_the_mean_over_subsets(self, k):
        for row, found in zip(self.rewards, adv.pass_at_k(self.rewards, k), strict=True):
            subsets = list(itertools.combinations(row.tolist(), k))
            assert found.item() == pytest.approx(sum(max(s) for s in subsets) / len(subsets))


def test_each_prompt_comes_once_an_epoch():
    batches = [batch_of(n, 4, 10, seed=3) for n in range(1, 11)]
    flat = list(itertools.chain(*batches))
    epochs = [flat[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert batches == [batch_of(n, 4, 10, seed=3) for n in range(1, 11)]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"estimator": "ppo"}, "rloo"),
        ({"group": 1}, "at least 2"),
        ({"updates": 0}, "`updates` must be a whole number, at least 1"),
        ({"temperature": 0.0}, "temperature"),
        ({"kl": -1.0}, "`kl` must be a number of 0 or more"),
    ],
)
def test_bad_configurations_are_refused(wrong, says):
    with pytest.raises(InputError, match=says):
        RLConfig(**wrong)


def test_rollouts_are_plain_data(steered):
    policy, _ = steered
    assert isinstance(drawn(policy), Rollouts)
    assert drawn(policy).tokens == int(drawn(policy).mask.sum())
