"""The Triton kernels against `naive` in fp64; without a GPU they run in Triton's interpreter, one program at a time."""

import importlib

import pytest
import torch

from tests.rebased.kernels.problems import POLYNOMIALS, problem, random_state, relative, with_gradients
from trimtab.errors import InputError
from trimtab.rebased.kernels import BASED, REBASED, naive

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytest.importorskip("triton", minversion="3.6" if ON_GPU else "3.7", reason="needs Triton: run `make test`")
fast = importlib.import_module("trimtab.rebased.kernels.triton")

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Relative error in norm; in 16 bits operands of products are bf16, of 8 bits."""


@pytest.fixture(autouse=True)
def short_spans(monkeypatch):
    """So that few tokens make several spans and chunks."""
    monkeypatch.setattr(fast, "SPAN", 32)
    monkeypatch.setattr(fast, "CHUNK", 16)
    monkeypatch.setattr(fast, "TILE", 16)


def compare(q, k, v, state, polynomial, **options):
    expected = with_gradients(naive.attention, *(t.double() for t in (q, k, v)), state, polynomial, 0.4, **options)
    on = {name: value.to(DEVICE) if torch.is_tensor(value) else value for name, value in options.items()}
    state = None if state is None else state.float().to(DEVICE)
    got = with_gradients(fast.attention, *(t.to(DEVICE) for t in (q, k, v)), state, polynomial, 0.4, **on)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert relative(a, b) < TOLERANCE[v.dtype]


@pytest.mark.parametrize("name", POLYNOMIALS)
@pytest.mark.parametrize("size", [(1, 3, 1, 2, 2), (2, 33, 2, 5, 9), (1, 100, 1, 16, 20)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_values_states_and_gradients(name, size, causal):
    q, k, v = problem(*size, dtype=torch.float32)
    for state in (None, random_state(q, v, POLYNOMIALS[name])):
        compare(q, k, v, state, POLYNOMIALS[name], causal=causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    compare(*problem(1, 70, 2, 16, 16, dtype=dtype), None, REBASED)


def test_a_mask_and_strides():
    q, k, v = (t.transpose(1, 2) for t in problem(2, 2, 40, 4, 5, dtype=torch.float32))
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, :9] = False
    compare(q, k, v, None, BASED, mask=mask)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="at most fp32"):
        fast.attention(*problem(1, 4, 1, 4, 4), REBASED, 1.0)
    with pytest.raises(InputError, match="d_k <= 16"):
        fast.attention(*problem(1, 4, 1, 17, 4, dtype=torch.float32), REBASED, 1.0)
