"""Chunked and recurrent forms against the definition: values, states and every gradient, at odd sizes."""

import pytest
import torch
import torch.nn.functional as F

from tests.rebased.kernels.problems import POLYNOMIALS, problem, random_state, relative, with_gradients
from trimtab.rebased.kernels import BASED, REBASED, chunk, empty_state, naive, step

SIZES = [(1, 2, 1, 1, 1), (2, 7, 1, 3, 5), (1, 33, 2, 4, 3), (2, 64, 3, 5, 8), (1, 130, 1, 16, 9)]


@pytest.mark.parametrize("name", POLYNOMIALS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("length", [1, 3, 16, 64, 200])
@pytest.mark.parametrize("causal", [True, False])
def test_every_chunk_size_gives_the_definition_and_its_gradients(name, size, length, causal):
    q, k, v = problem(*size)
    args = (POLYNOMIALS[name], 0.4)
    for state in (None, random_state(q, v, args[0])):
        expected = with_gradients(naive.attention, q, k, v, state, *args, causal=causal)
        got = with_gradients(chunk.attention, q, k, v, state, *args, causal=causal, chunk=length)
        for a, b in zip(got, expected, strict=True):
            assert a.shape == b.shape
            assert relative(a, b) < 1e-9


def test_gradients_are_those_of_finite_differences():
    q, k, v = (t.requires_grad_() for t in problem(1, 7, 2, 3, 2))
    state = random_state(q, v, BASED)[..., :-1].requires_grad_()

    def attention(q, k, v, state):  # the last column, what rounding left, is 0 in fp64
        out, after = chunk.attention(q, k, v, BASED, 0.6, state=F.pad(state, (0, 1)), chunk=3)
        assert not after[..., -1].any()
        return out, after[..., :-1]

    assert torch.autograd.gradcheck(attention, (q, k, v, state))


def test_a_mask_keeps_padding_out_of_values_and_gradients():
    q, k, v = problem(2, 20, 2, 4, 3)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :9] = False
    expected = with_gradients(naive.attention, q, k, v, None, BASED, 0.5, mask=mask)
    got = with_gradients(chunk.attention, q, k, v, None, BASED, 0.5, mask=mask, chunk=8)
    assert all(relative(a, b) < 1e-9 for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", POLYNOMIALS)
@pytest.mark.parametrize("cut", [1, 16, 37])
def test_a_split_prefill_and_single_steps_continue_where_it_stopped(name, cut):
    q, k, v = problem(2, 40, 2, 4, 3)
    args = (POLYNOMIALS[name], 0.5)
    whole, after = naive.attention(q, k, v, *args)
    first, state = chunk.attention(q[:, :cut], k[:, :cut], v[:, :cut], *args, chunk=16)
    steps = [step(q[:, t], k[:, t], v[:, t], *args, state) for t in range(cut, 40)]
    assert relative(torch.cat([first, torch.stack(steps, dim=1)], dim=1), whole) < 1e-9
    assert relative(state, after) < 1e-9


def test_steps_from_an_empty_state():
    q, k, v = problem(2, 5, 2, 4, 3)
    state = empty_state(2, 2, 4, 3, REBASED, q)
    steps = [step(q[:, t], k[:, t], v[:, t], REBASED, 0.5, state) for t in range(5)]
    assert relative(torch.stack(steps, dim=1), naive.attention(q, k, v, REBASED, 0.5)[0]) < 1e-9


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_long_sequences_in_low_precision(dtype, tolerance):
    """32,768 tokens: the sum of weights, some 10^6, overflows fp16 and would lose all its digits in bf16."""
    q, k, v = problem(1, 32_768, 1, 16, 8, dtype)
    q, k = 4 * q, 4 * k
    expected, _ = chunk.attention(*(t.double() for t in (q, k, v)), REBASED, 0.25)
    out, state = chunk.attention(q, k, v, REBASED, 0.25)
    assert out.dtype == dtype
    assert state.dtype == torch.float32
    assert state[0, 0, 0, -2] > 65_504
    assert relative(out, expected) < tolerance


def test_strided_inputs_need_no_copy_by_the_caller():
    q, k, v = (t.transpose(1, 2) for t in problem(2, 3, 40, 4, 5))  # [batch, time = 40, heads = 3]
    assert not q.is_contiguous()
    out, _ = chunk.attention(q, k, v, REBASED, 0.5, chunk=16)
    assert relative(out, naive.attention(q.contiguous(), k.contiguous(), v.contiguous(), REBASED, 0.5)[0]) < 1e-9


def test_memory_is_linear_in_time():
    """What autograd keeps grows by the same for every chunk; no [time, time] matrix is among it."""

    def kept(time):
        sizes = []
        q, k, v = (t.requires_grad_() for t in problem(1, time, 1, 4, 4, torch.float32))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            chunk.attention(q, k, v, REBASED, 0.5, chunk=64)
        return sum(sizes)

    assert kept(4096) < 2.1 * kept(2048)
