"""The CPU kernels and the autograd around them, against the naive definition in fp64."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.sae import kernels
from trimtab.sae.kernels import cpu, naive

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Relative to the largest entry of what is compared; fp32 and bf16 are that of their inputs' rounding."""


def case(rows, d_model, latents, k, seed=0, per_row=False):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    values = normal(rows, k).relu().sort(dim=1, descending=True).values
    indices = torch.randint(0, max(1, latents - 2), (rows, k), generator=generator)  # some latents never fire
    weights = torch.rand(rows if per_row else 1, k + 1, generator=generator, dtype=torch.float64)
    return normal(rows, d_model), values, indices, normal(latents, d_model), normal(d_model), weights


def differentiated(x, values, indices, W_dec, b_dec, weights):
    """(loss, gradients) of the definition, by autograd."""
    leaves = [t.clone().requires_grad_() for t in (values, W_dec, b_dec)]
    loss = naive.prefix_loss(x, leaves[0], indices, leaves[1], leaves[2], weights)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def assert_near(found, wanted, tolerance):
    for name, one, other in zip(("loss", "values", "W_dec", "b_dec"), found, wanted, strict=True):
        error = (one.double() - other).abs().max() / other.abs().max().clamp(min=1e-9)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


SHAPES = [
    (1, 1, 1, 1),
    (3, 5, 7, 2),
    (17, 63, 40, 12),
    (5, 64, 9, 8),
    (9, 65, 33, 33),
    (16, 576, 64, 32),
    (4, 640, 20, 5),
]
WEIGHTS = {
    "all": lambda w: w,
    "last": lambda w: torch.nn.functional.pad(torch.ones_like(w[:, :1]), (w.shape[1] - 1, 0)),
    "two": lambda w: w * (torch.arange(w.shape[1]) % 3 == 1),
    "empty prefix": lambda w: w * (torch.arange(w.shape[1]) == 0),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("per_row", [False, True], ids=["shared", "per row"])
@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefix_loss_and_its_gradients(shape, weighting, per_row, dtype):
    x, values, indices, W_dec, b_dec, weights = case(*shape, per_row=per_row)
    weights = WEIGHTS[weighting](weights)
    x, values, W_dec, b_dec = (t.to(dtype) for t in (x, values, W_dec, b_dec))  # compared at the rounded inputs
    found = cpu.prefix_gradients(x, values, indices, W_dec, b_dec, weights.to(torch.float64))
    wanted = differentiated(*(t.double() for t in (x, values)), indices, W_dec.double(), b_dec.double(), weights)
    assert_near(found, wanted, min(TOLERANCE[dtype], 1e-4))


def test_many_ranks_in_single_precision_do_not_drift():
    """Prefixes are taken back by subtraction on the way down: the error must stay that of fp32."""
    x, values, indices, W_dec, b_dec, weights = case(64, 64, 2048, 128)
    found = cpu.prefix_gradients(x.float(), values.float(), indices, W_dec.float(), b_dec.float(), weights.float())
    assert_near(found, differentiated(x, values, indices, W_dec, b_dec, weights), 1e-5)


def test_torchs_number_of_threads_is_left_alone():
    # In a process of its own: numba starts its threads once.
    script = (
        "import torch; torch.set_num_threads(1); from trimtab.sae.kernels import cpu; "
        "cpu.select(torch.randn(4, 600), 8); print(torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "1"


def test_every_thread_count_gives_the_same_bits():
    x, values, indices, W_dec, b_dec, weights = (
        t.float() if t.is_floating_point() else t for t in case(100, 200, 50, 9)
    )
    threads, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(cpu.prefix_gradients(x, values, indices, W_dec, b_dec, weights))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("rows", [1, 2])
def test_scatter_rows(rows):
    x, values, indices, *_ = case(40 * rows, 70, 25, 6)
    found, wanted = (module.scatter_rows(values, indices, x, 25) for module in (cpu, naive))
    torch.testing.assert_close(found, wanted)
    assert not found[-2:].any(), "rows of latents that never fire must be zero"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("latents", "k"), [(1, 1), (5, 5), (300, 7), (1000, 64), (4096, 32), (900, 300), (257, 256)])
def test_select_equals_a_stable_sort(latents, k, dtype):
    pre = torch.randn(30, latents, generator=torch.Generator().manual_seed(k)).to(dtype)
    pre[3] = -1.0  # nothing is positive
    pre[4] = 0.5  # all are equal
    pre[5, k // 2 :] = -2.0  # fewer than k are positive
    pre[6] = pre[6].round()  # many ties
    values, indices = cpu.select(pre, k)
    wanted_values, wanted_indices = naive.select(pre, k)
    assert torch.equal(values, wanted_values.to(values.dtype))
    assert torch.equal(indices, wanted_indices)


FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=6, max_size=6), min_size=1, max_size=4
    )
)
def test_select_on_any_numbers(rows):
    pre = torch.tensor(rows, dtype=torch.float32)
    for k in (1, 4, 6):
        (values, indices), wanted = cpu.select(pre, k), naive.select(pre, k)
        assert torch.equal(values, wanted[0])
        assert torch.equal(indices, wanted[1])


@pytest.mark.parametrize("broken", [float("nan"), -float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_row_that_is_not_finite_is_not_read_as_numbers(broken, dtype):
    """On x86 the NaN of an invalid operation has its sign set; as an integer it would pass for a negative number."""
    pre = torch.randn(3, 50).to(dtype)
    pre[1, 7] = broken
    values, _ = cpu.select(pre, 4)
    assert values[1].isnan().all()
    assert values[[0, 2]].isfinite().all()


def test_encode_and_prefix_loss_pass_a_finite_difference_check():
    x, values, indices, W_dec, b_dec, weights = case(4, 5, 9, 3)
    W_enc, b_enc = W_dec.flip(0).clone(), torch.full((9,), 0.3, dtype=torch.float64)

    def loss(x, values, W_dec, b_dec):
        return kernels.prefix_loss(x.detach(), values, indices, W_dec, b_dec, weights)

    def encoded(x, W_enc, b_enc):
        return kernels.encode(x, W_enc, b_enc, 3)[0]

    leaves = [t.requires_grad_() for t in (values, W_dec, b_dec)]
    assert torch.autograd.gradcheck(loss, (x, *leaves))
    assert torch.autograd.gradcheck(encoded, tuple(t.requires_grad_() for t in (x, W_enc, b_enc)))


def test_encoder_gradient_is_that_of_a_dense_encoder():
    x, _, _, W_enc, _, _ = case(20, 12, 40, 5)
    b_enc = torch.zeros(40, dtype=torch.float64)
    upstream = torch.randn(20, 5, dtype=torch.float64)
    found = [t.clone().requires_grad_() for t in (x, W_enc, b_enc)]
    kernels.encode(*found, 5)[0].backward(upstream)
    wanted = [t.clone().requires_grad_() for t in (x, W_enc, b_enc)]
    torch.relu(wanted[0] @ wanted[1].T + wanted[2]).topk(5).values.backward(upstream)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
