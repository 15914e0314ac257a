"""Every objective against its own definition, dense and in fp64, and against one another where they meet."""

import pytest
import torch

from trimtab.errors import InputError
from trimtab.sae import SAE, Arm, Latents
from trimtab.sae import objectives as module
from trimtab.sae.objectives import BatchTopK, Hierarchical, JumpReLU, Matryoshka, MultiTopK, TopK


def case(rows=30, d_model=16, latents=40, k=8, seed=0, jump=False):
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(d_model, latents, k, jump=jump, generator=generator).double()
    with torch.no_grad():
        for weight in (sae.b_dec, sae.W_dec):
            weight.normal_(generator=generator)
        sae.b_enc.normal_(0, 0.1, generator=generator)
    return sae, torch.randn(rows, d_model, generator=generator, dtype=torch.float64)


def gradients(loss_of, x, sae):
    sae.zero_grad()
    loss = loss_of(x, sae)
    (3 * loss).backward()  # the upstream gradient must be used
    return loss.detach(), {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}


def dense(x, sae):
    return torch.relu(x @ sae.W_enc.T + sae.b_enc)


def error(x, acts, sae):
    return (acts @ sae.W_dec + sae.b_dec - x).square().mean()


def kept(acts, k):
    """The k largest of each row, the rest zero."""
    return torch.where(acts >= acts.topk(k, dim=1).values[:, -1:], acts, 0)


def nested(x, sae):
    """Matryoshka, from its definition: a batch's largest activations, decoded by five nested dictionaries."""
    acts = dense(x, sae)
    acts = torch.where(acts >= acts.flatten().topk(8 * len(x)).values[-1], acts, 0)
    sizes = [round(sae.latents * share) for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)]
    return torch.stack([error(x, acts * (torch.arange(sae.latents) < size), sae) for size in sizes]).mean()


def whole_batch(x, sae):
    acts = dense(x, sae)
    return error(x, torch.where(acts >= acts.flatten().topk(8 * len(x)).values[-1], acts, 0), sae)


def over(budgets):
    return lambda x, sae: sum(w * error(x, kept(dense(x, sae), j), sae) for j, w in budgets.items())


DEFINITIONS = [
    (TopK(8), over({8: 1})),
    (MultiTopK(8), over({2: 1, 8: 1 / 8})),
    (Hierarchical(8), over(dict.fromkeys(range(1, 9), 1 / 8))),
    (Hierarchical.powers_of_two(8), over(dict.fromkeys((1, 2, 4, 8), 1 / 4))),
    (Hierarchical.powers_of_two(6), over(dict.fromkeys((1, 2, 4, 6), 1 / 4))),
    (BatchTopK(8), whole_batch),
    (Matryoshka(8), nested),
]


@pytest.mark.parametrize(("objective", "definition"), DEFINITIONS)
def test_loss_and_gradients_equal_the_definition(objective, definition):
    sae, x = case()
    loss, grads = gradients(lambda x, s: objective(x, s, None).value, x, sae)
    wanted, wanted_grads = gradients(definition, x, sae)
    torch.testing.assert_close(loss, wanted)
    assert set(grads) == {"W_enc", "W_dec", "b_enc", "b_dec"}
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted_grads[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Hierarchical(8, {8: 1.0}), TopK(8)),
        (Hierarchical(8, {2: 1.0, 8: 1 / 8}), MultiTopK(8)),
        (Hierarchical(1), TopK(1)),
    ],
    ids=["J = {K} is TopK", "J = {k, 4k} is Multi-TopK", "K = 1"],
)
def test_hierarchical_has_the_others_as_special_cases_to_the_bit(one, other):
    sae, x = case()
    sae, x = sae.float(), x.float()
    first, second = (gradients(lambda x, s, o=o: o(x, s, None).value, x, sae) for o in (one, other))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_all_budgets_alike_is_the_official_reduction():
    """mean over batch, budgets and dimensions (flexsae's reduction)."""
    sae, x = case()
    latents = sae.encode(x, 8)
    steps = sae.W_dec[latents.indices] * latents.values[..., None]
    official = (steps.cumsum(1) + sae.b_dec - x[:, None]).square().mean()
    torch.testing.assert_close(Hierarchical(8)(x, sae, None).value, official)


def test_latents_that_come_unsorted_are_sorted_first():
    sae, x = case()
    latents = sae.encode(x, 8)
    order = torch.rand(latents.values.shape, generator=torch.Generator().manual_seed(1)).argsort(dim=1)
    mixed = Latents(latents.values.gather(1, order), latents.indices.gather(1, order))
    budgets = Hierarchical(8).budgets
    torch.testing.assert_close(module.prefix_loss(x, mixed, sae, budgets), module.prefix_loss(x, latents, sae, budgets))
    assert latents.descending() is latents


def test_inactive_rows_and_repeated_latents_are_handled():
    sae, x = case()
    with torch.no_grad():
        sae.b_enc.fill_(-100)
    loss, grads = gradients(lambda x, s: Hierarchical(8)(x, s, None).value, x, sae)
    torch.testing.assert_close(loss, ((sae.b_dec - x) ** 2).mean().detach())
    assert grads["W_dec"].count_nonzero() == grads["W_enc"].count_nonzero() == 0
    twice = Latents(torch.tensor([[3.0, 2.0, 1.0]]).double().expand(30, 3), torch.tensor([[2, 2, 5]]).expand(30, 3))
    x_hat = sae.b_dec + 5 * sae.W_dec[2] + sae.W_dec[5]
    torch.testing.assert_close(module.prefix_loss(x, twice, sae, {3: 1.0}), (x - x_hat).square().mean())


def test_batchtopk_looks_further_where_one_row_takes_more_than_its_share():
    sae, x = case(rows=20, k=2)
    x[0] *= 50  # this row alone would fill the batch's budget
    latents = module.batch_topk(x, sae, 2, None)
    assert int((latents.values > 0).sum()) == 40
    assert int((latents.values[0] > 0).sum()) > 8


def test_jumprelu_thresholds_learn_by_the_papers_pseudo_derivatives():
    """Against sums written out for one latent: equations (11) and (12) of Rajamanoharan et al. 2024."""
    pre = torch.tensor([[0.95], [1.02], [1.5], [-1.0]], dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    acts, steps = module._Jump.apply(pre, threshold, 0.2)  # the rectangle spans 0.9 to 1.1
    assert acts.flatten().tolist() == [0, 1.02, 1.5, 0]
    assert steps.flatten().tolist() == [0, 1, 1, 0]
    (acts * torch.tensor([[1.0], [2.0], [4.0], [8.0]]) + 10 * steps).sum().backward()
    assert pre.grad.flatten().tolist() == [0, 2, 4, 0]
    assert threshold.grad.item() == pytest.approx(-((1 + 2) * 1.0 + 2 * 10) / 0.2)


def test_jumprelu_loss_is_reconstruction_plus_the_penalty_on_l0():
    sae, x = case(jump=True)
    with torch.no_grad():
        sae.log_threshold.fill_(-1.0)
    acts = dense(x, sae)
    acts = torch.where(acts > torch.tensor(-1.0).exp(), acts, 0)
    penalty = 0.1 * ((acts > 0).sum(1).double().mean() / 8 - 1) ** 2
    torch.testing.assert_close(JumpReLU(8)(x, sae, None).value, error(x, acts, sae) + penalty)
    with pytest.raises(InputError, match="jump=True"):
        JumpReLU(8)(x, case()[0], None)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("topk", "is not an arm"),
        ("topk-0", "is not an arm: the nearest is topk-1, of topk-K with K from 1 to"),
        ("topk-08", "the nearest is topk-8,"),
        ("topk-8.0", "the nearest is topk-8,"),
        ("topk-\u0668", "the nearest is topk-8,"),
        ("relu-4", "hierarchical-pow2-K"),
        ("multitopk-6", "multiple of 4"),
    ],
)
def test_a_name_that_is_no_arm_is_refused(name, says):
    with pytest.raises(InputError, match=says):
        Arm.parse(name)


def test_arms_are_named_and_made():
    for name in (
        "topk-8",
        "multitopk-8",
        "batchtopk-8",
        "matryoshka-8",
        "jumprelu-8",
        "hierarchical-8",
        "hierarchical-pow2-8",
        "hierarchical-pow2gap-8",
    ):
        arm = Arm.parse(name)
        assert (str(arm), arm.k, arm.objective().k) == (name, 8, 8)
    assert Arm.parse("hierarchical-pow2-6").objective().budgets == dict.fromkeys((1, 2, 4, 6), 1 / 4)
    assert Arm.parse("hierarchical-pow2gap-6").objective().budgets == {1: 1 / 6, 2: 1 / 6, 4: 2 / 6, 6: 2 / 6}
    with pytest.raises(InputError, match="hold k = 8"):
        Hierarchical(8, {2: 1.0, 4: 1.0})
