"""The sum of weights where a query is nearly orthogonal to the keys: every form, both ways, against fp64."""

import contextlib
import importlib
import math

import pytest
import torch

from tests.rebased.kernels.problems import relative
from trimtab.rebased.kernels import BASED, REBASED, chunk, cpu, empty_state, expand, naive, step
from trimtab.rebased.kernels.denominator import EPS, _blockwise, denominators

FORMS = {"naive": naive.attention, "chunk": chunk.attention}
with contextlib.suppress(ImportError):
    FORMS["triton"] = importlib.import_module("trimtab.rebased.kernels.triton").attention


def nearly_orthogonal(ratio, time=200, d=8, dtype=torch.float64):
    """One query after many keys, with p(q.k) about `ratio` of |phi(q)| |phi(k)|; values are 1, so that the output
    before division is the sum of weights itself."""
    generator = torch.Generator().manual_seed(0)
    k = torch.zeros(1, time, 1, d, dtype=torch.float64)
    q = torch.zeros_like(k)
    q[..., : d // 2] = torch.randn(1, time, 1, d // 2, generator=generator, dtype=torch.float64)
    k[..., d // 2 :] = torch.randn(1, time, 1, d // 2, generator=generator, dtype=torch.float64)
    k[..., : d // 2] = math.sqrt(ratio) * torch.randn(1, time, 1, d // 2, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), torch.ones(1, time, 1, 16, dtype=dtype)


def weighed(q, k, polynomial, scale):
    """z [time] in fp64, from the definition, and |phi(q)| |S|."""
    q, k = q[0, :, 0].double(), k[0, :, 0].double()
    z = polynomial(scale * q @ k.T).tril().sum(dim=1)
    sums = expand(k, polynomial, scale).cumsum(dim=0)
    return z, expand(q, polynomial, scale).norm(dim=1) * sums.norm(dim=1)


def recurrent(q, k, v, polynomial, scale, eps=EPS):
    state = empty_state(*k.shape[::2], k.shape[3], v.shape[3], polynomial, v)
    out = [step(q[:, t], k[:, t], v[:, t], polynomial, scale, state, eps=eps) for t in range(q.shape[1])]
    return torch.stack(out, dim=1), state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("ratio", [1.0, 1e-3, 1e-5, 3e-6])
def test_the_sum_of_weights_is_right_to_a_thousandth_above_a_millionth(ratio, dtype):
    """Read from the denominator itself, which every form divides by."""
    q, k, _ = nearly_orthogonal(ratio, dtype=dtype)
    z, size = weighed(q, k, REBASED, 0.35)
    for causal in (True, False):
        working = torch.float64 if dtype == torch.float64 else torch.float32
        found = denominators(q, k, None, None, REBASED, 0.35, causal, EPS, working)
        expected = z if causal else REBASED(0.35 * q[0, :, 0].double() @ k[0, :, 0].double().T).sum(dim=1)
        counted = expected > 1e-6 * (size if causal else size[-1])
        assert counted.sum() > 20
        error = (1 / found.inverse[0, :, 0].double() / expected - 1).abs()[counted]
        assert error.max() < 1e-3
        assert (found.slope[0, counted, 0] == found.inverse[0, counted, 0]).all()


@pytest.mark.parametrize("name", [*FORMS, "recurrent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_form_divides_by_it(name, dtype):
    """Numerators are summed in fp32, whose rounding is 6e-8 of |phi(q)| |S|, 6 % of a denominator of 1e-6 of it."""
    q, k, v = nearly_orthogonal(1e-3, dtype=dtype)
    z, size = weighed(q, k, REBASED, 0.35)
    out = (FORMS.get(name) or recurrent)(q, k, v, REBASED, 0.35)[0][0, :, 0, 0].double()
    counted = z > 1e-4 * size
    assert counted.sum() > 50
    assert (out - 1).abs()[counted].max() < (5e-3 if dtype == torch.float32 else 3e-2)
    assert (out - 1).abs()[z > 1e-6 * size].max() < 0.3


@pytest.mark.parametrize("polynomial", [REBASED, BASED], ids=["rebased", "based"])
@pytest.mark.parametrize("name", [*FORMS, "recurrent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonal_queries_stay_bounded(name, dtype, polynomial):
    """Was up to 2.7e4, with negative denominators and gradients of 4e4."""
    q, k, _ = nearly_orthogonal(0.0, time=100 if name == "triton" else 1024, dtype=dtype)
    v = torch.randn(*k.shape[:3], 16, generator=torch.Generator().manual_seed(3)).to(dtype)
    # A rotation hides the zeros, so that fp32 has something to round.
    turn, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    q, k = ((x.double() @ turn).to(dtype) for x in (q, k))
    if name == "recurrent":
        out, _ = recurrent(q, k, v, polynomial, 0.35)
        assert out.abs().max() <= 2 * v.abs().max()
        return
    upstream = torch.randn(v.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def gradients(form, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out, _ = form(*leaves, polynomial, 0.35)
        assert out.abs().max() <= 2 * v.abs().max()
        return torch.autograd.grad(out, leaves, upstream.to(dtype))

    # Rounded to bf16, queries are not orthogonal any more, and gradients are large in truth too.
    for got, truth in zip(gradients(FORMS[name], dtype), gradients(naive.attention, torch.float64), strict=True):
        assert got.isfinite().all()
        assert got.double().norm(dim=-1).max() < 1e3 + 2 * truth.norm(dim=-1).max()


@pytest.mark.parametrize("name", [each for each in FORMS if each != "naive"])
def test_gradients_through_small_sums_are_those_of_fp64(name):
    q, k, v = (x.float() for x in nearly_orthogonal(1e-2, time=150))
    v = torch.randn(v.shape, generator=torch.Generator().manual_seed(3))
    upstream = torch.randn(v.shape, generator=torch.Generator().manual_seed(4))

    def gradients(form, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out, _ = form(*leaves, REBASED, 0.35)
        return torch.autograd.grad(out, leaves, upstream.to(dtype))

    for got, expected in zip(
        gradients(FORMS[name], torch.float32), gradients(naive.attention, torch.float64), strict=True
    ):
        assert relative(got, expected) < 1e-3


def test_a_carried_state_keeps_the_digits_of_the_sum():
    q, k, v = nearly_orthogonal(1e-5, dtype=torch.float32)
    whole, after = naive.attention(q, k, v, REBASED, 0.35)
    first, state = chunk.attention(q[:, :77], k[:, :77], v[:, :77], REBASED, 0.35)
    rest, last = chunk.attention(q[:, 77:], k[:, 77:], v[:, 77:], REBASED, 0.35, state=state)
    total, carried = (x[..., -2].double() + x[..., -1].double() for x in (after, last))
    assert relative(carried, total) < 1e-13
    z, size = weighed(q, k, REBASED, 0.35)
    counted = z > 1e-6 * size
    out = torch.cat([first, rest], dim=1)
    assert (out - whole)[0, counted].abs().max() < 0.3


def test_the_denominator_is_never_below_half_a_unit_of_its_bound():
    """q = (1, 0), k = (0, 1): z = 0, |q|^2 |k|^2 = 1, so that 2^-24 + eps is what is divided by, and z has no slope."""
    q, k = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2), torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    found = denominators(q, k, None, None, REBASED, 1.0, True, 1e-9, torch.float32)
    assert found.inverse.item() == pytest.approx(1 / (2**-24 + 1e-9))
    assert found.slope.item() == 0
    assert denominators(q, k, None, None, REBASED, 1.0, True, 1e-9, torch.float64).inverse.item() == pytest.approx(
        1 / (2**-53 + 1e-9)
    )


@pytest.mark.parametrize("polynomial", [REBASED, BASED], ids=["rebased", "based"])
@pytest.mark.parametrize("causal", [True, False])
def test_on_other_devices_it_is_the_same(polynomial, causal):
    """What a GPU without the Triton kernel runs, against the CPU's."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 150, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(2, 150, generator=generator) > 0.2
    start = expand(torch.randn(6, 9, 5, generator=generator, dtype=torch.float64), polynomial, 0.4).sum(dim=1)
    totals = start.clone(), start.clone()
    ours = cpu.denominators(q, k, mask, totals[0], polynomial, 0.4, causal)
    other = _blockwise(q, k, mask, totals[1], polynomial, 0.4, causal)
    for a, b in zip((*ours, totals[0]), (*other, totals[1]), strict=True):
        assert relative(a, b) < 1e-13
