"""The Triton kernels against `naive` in fp64; without a GPU they run in Triton's interpreter, one program at a time."""

import importlib

import pytest
import torch

from trimtab.sae import kernels
from trimtab.sae.kernels import naive

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Triton 3.6 compiles the kernels as well, but its interpreter fails with NumPy 2.4; conftest.py turns that on.
pytest.importorskip("triton", minversion="3.6" if ON_GPU else "3.7", reason="needs Triton: run `make test`")
fast = importlib.import_module("trimtab.sae.kernels.triton")

TOLERANCE = 1e-6
"""Relative error in norm, for every dtype: rounded inputs are exact in the reference, all the rest is fp32."""
gpu_only = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


@pytest.fixture(autouse=True)
def deterministic():
    """Makes PyTorch refuse what adds atomically, and fill new memory with NaN: what is read must have been written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def budgets(kind: str, k: int, batch: int) -> torch.Tensor:
    """[1, k + 1], or [batch, k + 1] for `rows`."""
    weights = torch.rand(batch if kind.startswith("rows") else 1, k + 1) + 0.1
    if kind in ("powers", "last"):
        kept = {"powers": [2**i for i in range(k.bit_length())], "last": [k]}[kind]
        weights = torch.zeros_like(weights).index_copy(1, torch.tensor(kept), weights[:, kept])
    if kind == "rows-sparse":  # no two rows alike; no row has a weight at rank k
        weights = weights * (torch.rand_like(weights) < 0.3)
        weights[:, k] = 0
    return weights


def problem(batch: int, k: int, d_model: int, latents: int, kind: str = "all", dtype=torch.float32, values_dtype=None):
    """Arguments of `prefix_loss` with unordered values, ties, a latent twice in a row, zeros and a row of zeros.

    The last two latents never fire.
    """
    torch.manual_seed(batch + 10 * k + 100 * d_model)
    values = torch.rand(batch, k) + 0.1
    values[batch // 2, k // 2 :] = 0  # fewer than k positive
    values[1:2] = values[1:2, :1]  # ties
    values[2:3] = 0
    indices = torch.randint(0, max(1, latents - 2), (batch, k))
    indices[:, k // 2] = indices[:, 0]
    x, W_dec, b_dec = torch.randn(batch, d_model), torch.randn(latents, d_model), torch.randn(d_model)
    x, W_dec, b_dec = (t.to(dtype) for t in (x, W_dec, b_dec))
    tensors = (x, values.to(values_dtype or torch.float32), indices, W_dec, b_dec, budgets(kind, k, batch))
    return tuple(t.to(DEVICE) for t in tensors)


def reference(x, values, indices, W_dec, b_dec, weights):
    """(loss, d_values, d_W_dec, d_b_dec) by autograd in fp64, on the CPU."""
    x, values, W_dec, b_dec, weights = (t.detach().double().cpu() for t in (x, values, W_dec, b_dec, weights))
    leaves = [t.requires_grad_() for t in (values, W_dec, b_dec)]
    loss = naive.prefix_loss(x, values, indices.cpu(), W_dec, b_dec, weights)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def assert_close(got, expected, tolerance=TOLERANCE):
    for name, a, b in zip(("loss", "d_values", "d_W_dec", "d_b_dec"), got, expected, strict=True):
        assert a.dtype == torch.float32
        assert a.shape == b.shape
        assert (a.double().cpu() - b).norm() <= tolerance * b.norm(), name


@pytest.mark.parametrize(
    ("batch", "k", "d_model", "latents", "kind"),
    [
        (1, 1, 5, 1, "all"), (7, 1, 5, 11, "last"), (5, 3, 64, 13, "all"), (5, 3, 5, 2, "rows"),
        (5, 8, 100, 17, "powers"), (7, 8, 5, 23, "rows-sparse"), (3, 12, 576, 13, "all"), (3, 12, 64, 31, "last"),
        (3, 12, 100, 13, "rows"), (3, 33, 576, 37, "powers"), (5, 33, 5, 41, "all"), (3, 33, 64, 41, "rows-sparse"),
    ],
)  # fmt: skip
def test_loss_and_gradients(batch, k, d_model, latents, kind):
    arguments = problem(batch, k, d_model, latents, kind)
    got = fast.prefix_gradients(*arguments)
    assert_close(got, reference(*arguments))
    assert not got[2][latents - 2 :].any() or latents <= 2, "a latent that never fires has no gradient"


@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, values_dtype):
    arguments = problem(5, 8, 100, 17, "powers", dtype, values_dtype)
    assert_close(fast.prefix_gradients(*arguments), reference(*arguments))


def test_every_input_may_have_its_own_dtype_and_strides():
    x, values, indices, W_dec, b_dec, weights = problem(5, 8, 100, 17)
    arguments = (
        x.bfloat16().T.contiguous().T, values.double(), indices.int().T.contiguous().T,
        W_dec.T.contiguous().T, b_dec.half(), weights.double(),
    )  # fmt: skip
    assert_close(fast.prefix_gradients(*arguments), reference(*arguments))


@pytest.mark.parametrize("weights", [[0, 0, 0, 0], [2, 0, 0, 0], [0, 1, 0, 0], [3, 0, 1, 0]])
def test_weights_that_leave_out_the_upper_prefixes(weights):
    *arguments, _ = problem(5, 3, 64, 13)
    arguments.append(torch.tensor([weights], dtype=torch.float32, device=DEVICE))
    assert_close(fast.prefix_gradients(*arguments), reference(*arguments))


def test_no_latent_fires():
    x, values, *rest = problem(5, 3, 64, 13)
    got = fast.prefix_gradients(x, torch.zeros_like(values), *rest)
    assert_close(got, reference(x, torch.zeros_like(values), *rest))
    assert not got[2].any()
    assert got[1].any(), "a latent at zero still has a gradient, which ReLU stops"


@pytest.mark.parametrize("suffix_bytes", [1, 4 * 5 * 8 * 32, 4 * 5 * 8 * 70])
@pytest.mark.parametrize("kind", ["all", "powers"])
def test_slabs(monkeypatch, suffix_bytes, kind):
    arguments = problem(5, 8, 100, 17, kind)
    monkeypatch.setattr(fast, "SUFFIX_BYTES", suffix_bytes)
    assert_close(fast.prefix_gradients(*arguments), reference(*arguments))


@pytest.mark.parametrize("d_model", [5, 576, 640, 2304, 2305])
@pytest.mark.parametrize("rows", [0, 1, 4096 * 8, 4096 * 32, 4096 * 128, 2**20])
def test_slabs_fit_the_budget_and_cover_the_columns(d_model, rows):
    block, width = fast._slab(rows, d_model)
    assert width % block == 0
    assert block in (32, 64, 128, 256)
    assert 4 * rows * width <= fast.SUFFIX_BYTES
    assert width < d_model + block


@pytest.mark.parametrize("chunk", [4, 7])
@pytest.mark.parametrize("latents", [3, 9])
def test_a_latent_that_fires_on_every_row(monkeypatch, chunk, latents):
    """Its pairs are summed in chunks; so are its neighbours', wherever in a chunk they begin and end."""
    monkeypatch.setattr(fast, "CHUNK", chunk)
    x, values, indices, *rest = problem(29, 3, 5, latents)
    indices[:, 1] = (latents - 1) // 2
    for chosen in (indices, torch.full_like(indices, latents - 1)):
        assert_close(fast.prefix_gradients(x, values, chosen, *rest), reference(x, values, chosen, *rest))


@pytest.mark.parametrize(("batch", "d_model", "latents"), [(150, 5, 3), (7, 576, 13), (1, 100, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scatter_rows(batch, d_model, latents, dtype):
    x, coefficients, indices, *_ = problem(batch, 3, d_model, latents, dtype=dtype)
    coefficients = coefficients - 0.5
    got = fast.scatter_rows(coefficients, indices, x, latents)
    coefficients, x = coefficients.double().cpu(), x.double().cpu()
    expected = naive.scatter_rows(coefficients, indices.cpu(), x, latents)
    assert got.dtype == torch.float32
    assert (got.double().cpu() - expected).norm() <= TOLERANCE * expected.norm()
    if latents > 2:
        assert not got[-2:].any()


def test_the_same_bits_every_time():
    arguments = problem(7, 8, 100, 5)
    first = fast.prefix_gradients(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, fast.prefix_gradients(*arguments), strict=True))
    x, coefficients, indices, *_ = arguments
    assert torch.equal(*(fast.scatter_rows(coefficients, indices, x, 5) for _ in range(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_select(dtype):
    torch.manual_seed(0)
    pre = torch.stack([torch.randn(50), torch.randn(50) - 2, -torch.rand(50), torch.zeros(50)]).to(DEVICE, dtype)
    pre[0, 3] = pre[0, 30] = 4  # ties
    values, indices = fast.select(pre, 12)
    expected, order = naive.select(pre, 12)
    assert torch.equal(values, expected)
    assert torch.equal(torch.relu(pre).gather(1, indices), values)
    assert all(len(set(row)) == 12 for row in indices.tolist())
    distinct = (values > 0) & (values != values.roll(1, 1)) & (values != values.roll(-1, 1))
    assert torch.equal(indices[distinct], order[distinct])


@gpu_only
@pytest.mark.parametrize(("k", "kind"), [(32, "all"), (128, "powers"), (128, "all")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_size(k, kind, dtype):
    arguments = problem(199, k, 2304, 65_536, kind, dtype)
    got = fast.prefix_gradients(*arguments)
    assert_close(got, reference(*arguments), 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(got, fast.prefix_gradients(*arguments), strict=True))


@gpu_only
def test_offsets_beyond_32_bits():
    """The last latents of a dictionary of more than 2^31 numbers, and those alone in a small one: the same bits."""
    x, values, indices, W_dec, b_dec, weights = problem(37, 8, 2304, 64)
    latents = 2**31 // 2304 + 100
    large = torch.zeros(latents, 2304, dtype=torch.bfloat16, device=DEVICE)
    large[-64:] = W_dec
    got = fast.prefix_gradients(x, values, indices + latents - 64, large, b_dec, weights)
    expected = fast.prefix_gradients(x, values, indices, W_dec.bfloat16(), b_dec, weights)
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[2][-64:], expected[2])
    assert not got[2][:-64].any()
    assert torch.equal(fast.scatter_rows(values, indices + latents - 64, x, latents)[-64:],
                       fast.scatter_rows(values, indices, x, 64))  # fmt: skip


@gpu_only
def test_a_cuda_tensor_chooses_these_kernels():
    x, values, indices, W_dec, b_dec, weights = problem(5, 8, 100, 17)
    leaves = [t.requires_grad_() for t in (values, W_dec, b_dec)]
    loss = kernels.prefix_loss(x, leaves[0], indices, leaves[1], leaves[2], weights)
    assert_close(
        (loss.detach(), *torch.autograd.grad(loss, leaves)), reference(x, values, indices, W_dec, b_dec, weights)
    )
