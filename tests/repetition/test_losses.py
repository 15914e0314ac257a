"""Losses and their gradients against definitions in fp64, enumeration and finite differences."""

import itertools
import math

import pytest
import torch

from trimtab.interventions import wrap
from trimtab.repetition.losses import accumulate, first_of_kind, token_unlikelihood, weighted
from trimtab.rl.policy import FullPolicy, Policy


def problem(tokens=7, vocab=11, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(tokens, vocab, generator=generator, dtype=torch.float64)
    target = torch.randint(vocab, (tokens,), generator=generator)
    likely, unlikely = torch.randn(2, tokens, generator=generator)
    return logits.to(dtype).requires_grad_(), target, likely, unlikely


def naive(logits, target, likely, unlikely):
    p = logits.double().softmax(dim=1).gather(1, target[:, None])[:, 0]
    return -(likely * p.log() + unlikely * (1 - p).log()).sum()


def test_weighted_is_its_definition_with_its_gradient():
    logits, target, likely, unlikely = problem()
    value = weighted(logits, target, likely, unlikely)
    (gradient,) = torch.autograd.grad(value, logits)
    reference = logits.detach().double().requires_grad_()
    expected = naive(reference, target, likely, unlikely)
    (expected_gradient,) = torch.autograd.grad(expected, reference)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)


def test_weighted_against_a_finite_difference():
    logits, target, likely, unlikely = problem(tokens=2, vocab=5)
    value = weighted(logits, target, likely, unlikely)
    (gradient,) = torch.autograd.grad(2 * value, logits)  # and what comes from above is passed on
    for place in itertools.product(range(2), range(5)):
        step = torch.zeros_like(logits, dtype=torch.float64)
        step[place] = 1e-5
        base = logits.detach().double()
        change = naive(base + step, target, likely, unlikely) - naive(base - step, target, likely, unlikely)
        assert gradient[place].item() == pytest.approx((change / 1e-5).item(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("gap", [5.0, 20.0, 60.0, 200.0])
def test_unlikelihood_stays_finite_and_keeps_pushing_as_p_nears_one(gap):
    """At the target the gradient is p, at most 1, whether or not 1 - p can be told from 0."""
    logits = torch.zeros(1, 4)
    logits[0, 2] = gap
    logits.requires_grad_()
    value = weighted(logits, torch.tensor([2]), torch.zeros(1), torch.ones(1))
    value.backward()
    assert value.item() == pytest.approx(math.log(3 + math.exp(gap)) - math.log(3), rel=1e-3)
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 2].item() == pytest.approx(1.0, abs=0.03)
    if gap < 80:
        assert logits.grad[0, 0].item() == pytest.approx(-1 / 3, abs=0.02)


def test_policy_gradient_on_a_toy_vocabulary_is_that_of_the_expected_reward():
    """Sum over all sequences of two tokens of pi R grad log pi, against the gradient of sum pi R."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True)
    then = torch.randn(3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    rewards = torch.rand(3, 3, generator=generator, dtype=torch.float64)
    expected = sum(
        first.softmax(0)[a] * then[a].softmax(0)[b] * rewards[a, b] for a, b in itertools.product(range(3), repeat=2)
    )
    wanted = torch.autograd.grad(expected, (first, then))
    found = [torch.zeros(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)]
    for a, b in itertools.product(range(3), repeat=2):
        logits = torch.stack([first, then[a]]).detach().float().requires_grad_()
        share = (first.softmax(0)[a] * then[a].softmax(0)[b]).item()
        likely = torch.full((2,), share * (rewards[a, b].item() - 0.37))  # any baseline
        weighted(logits, torch.tensor([a, b]), likely, torch.zeros(2)).backward()
        found[0] -= logits.grad[0].double()
        found[1][a] -= logits.grad[1].double()
    for mine, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-6)


def test_token_unlikelihood_by_hand():
    """Row a b a c: candidates of b: a; of the second a: b (not a itself); of c: a, b."""
    row = torch.tensor([4, 1, 4, 2])
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    p = logits.softmax(dim=1)
    wanted = -sum((1 - p[t, c]).log() for t, c in [(0, 4), (1, 1), (2, 4), (2, 1)])
    found = token_unlikelihood(logits.float(), row, torch.tensor([1, 2, 3]))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    alone = token_unlikelihood(logits[2:].float(), row, torch.tensor([3]))  # in any chunks
    assert alone.item() == pytest.approx(-((1 - p[2, 4]).log() + (1 - p[2, 1]).log()).item(), rel=1e-5)


@pytest.mark.parametrize("gap", [8.0, 20.0, 30.0])
def test_token_unlikelihood_pushes_a_candidate_that_is_all_but_certain(gap):
    """The gradient at its logit is p."""
    logits = torch.zeros(1, 4)
    logits[0, 0] = gap
    logits.requires_grad_()
    token_unlikelihood(logits, torch.tensor([0, 1]), torch.tensor([1])).backward()
    assert logits.grad[0].tolist() == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3], abs=2e-3)


def test_first_of_kind():
    assert first_of_kind(torch.tensor([3, 1, 3, 3, 2, 1])).tolist() == [True, True, False, False, True, False]


@pytest.fixture
def policy(tiny_llama, tokenizer):
    import copy

    model = copy.deepcopy(tiny_llama)
    return FullPolicy(wrap(model, tokenizer)), model


def test_accumulate_is_the_gradient_of_the_whole_pass(policy):
    made, model = policy
    rows = torch.randint(258, (3, 60), generator=torch.Generator().manual_seed(3))
    likely, unlikely = torch.rand(2, 3, 40, generator=torch.Generator().manual_seed(4))

    def loss(logits, chunk):
        at = [each.flatten()[chunk] for each in (rows[:, 20:], likely, unlikely)]
        return weighted(logits, *at)

    total, log_probs = accumulate(made, rows, 20, loss)  # 120 predictions: two chunks
    made.collect_gradients()
    found = {name: parameter.grad.clone() for name, parameter in made.trained.items()}
    logits = model(rows[:, :-1]).logits[:, 19:]
    p = logits.log_softmax(2).gather(2, rows[:, 20:, None])[..., 0]
    torch.testing.assert_close(log_probs.view(3, 40), p, rtol=1e-4, atol=1e-5)
    wanted = -(likely * p + unlikely * (1 - p.exp()).log()).sum()
    assert total == pytest.approx(wanted.item(), rel=1e-4)
    wanted.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_accumulate_without_a_loss_keeps_no_gradient(tiny_llama, tokenizer):
    frozen = Policy(wrap(tiny_llama, tokenizer), {})
    rows = torch.randint(258, (2, 30), generator=torch.Generator().manual_seed(5))
    total, log_probs = accumulate(frozen, rows, 1, None)
    expected = tiny_llama(rows, labels=rows).loss
    assert total == 0.0
    assert -log_probs.mean().item() == pytest.approx(expected.item(), rel=1e-4)
    assert all(parameter.grad is None for parameter in tiny_llama.parameters())
