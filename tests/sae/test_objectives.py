"""Losses and every gradient against a definition one can read, in fp64."""

import pytest
import torch

from trimtab.sae import SAE, Latents, hierarchical_loss, topk_loss
from trimtab.sae import objectives as module


def naive(x, latents, sae, budgets):
    """Mean over budgets of the mean squared error, every prefix materialised."""
    rows = sae.W_dec[latents.indices] * latents.values[..., None]
    losses = [((rows[:, :j].sum(1) + sae.b_dec - x) ** 2).mean() for j in budgets]
    return torch.stack(losses).mean()


def case(rows, d_model, latents, k, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(d_model, latents, generator=generator).to(dtype)
    with torch.no_grad():
        sae.b_dec.normal_(generator=generator)
        sae.b_enc.normal_(0, 0.1, generator=generator)
        sae.W_dec.normal_(generator=generator)
    x = torch.randn(rows, d_model, generator=generator, dtype=dtype)
    return sae, x


def gradients(loss_of, x, sae, k):
    sae.zero_grad()
    loss = loss_of(x, sae.encode(x, k), sae)
    (3 * loss).backward()  # the upstream gradient must be used
    return loss.detach(), {name: p.grad.clone() for name, p in sae.named_parameters()}


@pytest.mark.parametrize(
    ("rows", "d_model", "latents", "k"), [(1, 3, 5, 1), (7, 16, 40, 6), (300, 9, 33, 12), (16, 576, 64, 64)]
)
@pytest.mark.parametrize("objective", ["topk", "hierarchical"])
def test_loss_and_gradients_equal_the_definition(rows, d_model, latents, k, objective):
    sae, x = case(rows, d_model, latents, k)
    budgets = [k] if objective == "topk" else range(1, k + 1)
    loss, grads = gradients(module.OBJECTIVES[objective], x, sae, k)
    want, want_grads = gradients(lambda x, z, s: naive(x, z, s, budgets), x, sae, k)
    torch.testing.assert_close(loss, want)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want_grads[name], msg=lambda m, n=name: f"{n}: {m}")


def test_gradients_pass_a_finite_difference_check():
    sae, x = case(5, 4, 9, 4)
    latents = sae.encode(x, 4)
    values = latents.values.detach().requires_grad_()

    def loss(values, W_dec, b_dec):
        return module._Hierarchical.apply(x, values, latents.indices, W_dec, b_dec)

    assert torch.autograd.gradcheck(loss, (values, sae.W_dec, sae.b_dec))


def test_one_budget_is_topk_and_chunks_do_not_matter(monkeypatch):
    sae, x = case(50, 12, 30, 1)
    torch.testing.assert_close(hierarchical_loss(x, sae.encode(x, 1), sae), topk_loss(x, sae.encode(x, 1), sae))
    whole = gradients(hierarchical_loss, x, sae, 8)
    monkeypatch.setattr(module, "CHUNK", 7)
    cut = gradients(hierarchical_loss, x, sae, 8)
    torch.testing.assert_close(cut, whole)


def test_inactive_and_repeated_latents_are_handled():
    """All-zero activations (every unit negative), and one latent chosen in several ranks, as ties may give."""
    sae, x = case(6, 5, 8, 4)
    with torch.no_grad():
        sae.b_enc.fill_(-100)
    loss, grads = gradients(hierarchical_loss, x, sae, 4)
    torch.testing.assert_close(loss, ((sae.b_dec - x) ** 2).mean().detach())
    assert grads["W_dec"].count_nonzero() == grads["W_enc"].count_nonzero() == 0
    values = torch.rand(6, 3, dtype=torch.float64)
    twice = Latents(values, torch.tensor([[2, 2, 5]]).expand(6, 3))
    torch.testing.assert_close(hierarchical_loss(x, twice, sae), naive(x, twice, sae, [1, 2, 3]))


@pytest.mark.parametrize("k", [32, 64])
def test_single_precision_does_not_drift_over_many_ranks(k):
    """Prefixes are taken back by subtraction on the way down: the error must stay that of fp32."""
    sae, x = case(128, 64, 2048, k)
    want, want_grads = gradients(hierarchical_loss, x, sae, k)
    sae32, x32 = sae.float(), x.float()
    loss, grads = gradients(hierarchical_loss, x32, sae32, k)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    for name, grad in grads.items():
        error = (grad.double() - want_grads[name]).norm() / want_grads[name].norm()
        assert error < 1e-4, f"{name}: relative error {error:.1e}"
