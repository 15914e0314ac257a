"""What the kernels are: the features of an outer product, whose inner product is the polynomial."""

import math

import pytest
import torch

from tests.rebased.kernels.problems import POLYNOMIALS, problem
from trimtab.rebased.kernels import BASED, REBASED, Polynomial, expand, naive


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_the_inner_product_of_features_is_the_polynomial(name):
    polynomial, x, y = POLYNOMIALS[name], *torch.randn(2, 50, 5, dtype=torch.float64)
    product = (expand(x, polynomial, 0.7) * expand(y, polynomial, 0.7)).sum(1)
    s = 0.7 * (x * y).sum(1)
    expected = polynomial.constant + polynomial.linear * s + polynomial.quadratic * s**2
    assert torch.allclose(product, expected)
    assert torch.allclose(polynomial(s), expected)
    assert expand(x, polynomial, 0.7).shape[1] == polynomial.features(5)


def test_features_are_of_the_outer_product_not_of_elementwise_squares():
    q, k = torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])
    assert expand(q, REBASED, 1.0) @ expand(k, REBASED, 1.0) == pytest.approx(0.0, abs=1e-6)  # (q.k)^2
    assert (q**2) @ (k**2) == 2.0  # what the misreading would give
    assert REBASED.features(16) == 136


def test_baseds_polynomial_is_the_taylor_expansion_of_exp_and_its_features_153():
    s = torch.tensor([-1.0, 0.0, 0.3], dtype=torch.float64)
    assert BASED(s).tolist() == pytest.approx([0.5, 1.0, 1 + 0.3 + 0.045])
    assert BASED.features(16) == 153
    assert float(BASED(torch.tensor(-1.0))) == float(min(BASED(torch.linspace(-3, 3, 601))))  # never below 1/2


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_the_slope_is_the_derivative(name):
    s = torch.randn(9, dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(POLYNOMIALS[name](s).sum(), s)
    assert torch.allclose(POLYNOMIALS[name].slope(s.detach()), derivative)


def test_a_polynomial_without_a_square_or_with_a_negative_term_is_refused():
    for coefficients in ((1.0, 1.0, 0.0), (-1.0, 0.0, 1.0)):
        with pytest.raises(ValueError, match="coefficients"):
            Polynomial(*coefficients)


def test_the_definition_by_hand():
    """Two tokens, one head: the second output weighs the values by (q.k / sqrt 2)^2."""
    q = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)[None, :, None]
    k = torch.tensor([[1.0, 1.0], [2.0, 0.0]], dtype=torch.float64)[None, :, None]
    v = torch.tensor([[1.0], [5.0]], dtype=torch.float64)[None, :, None]
    out, state = naive.attention(q, k, v, REBASED, 1 / math.sqrt(2), eps=0.0)
    assert out.flatten().tolist() == pytest.approx([1.0, (2 * 1 + 2 * 5) / 4])
    assert state.shape == (1, 1, 3, 3)
    # Sum of phi(k) [v, 1], and what rounding left of the last:
    # k1 k1^T = [[1, 1], [1, 1]], k2 k2^T = [[4, 0], [0, 0]], each times scale 1 / sqrt 2.
    root = 1 / math.sqrt(2)
    expected = [[root * (1 + 4 * 5), root * 5, 0.0], [1.0, 1.0, 0.0], [root, root, 0.0]]
    assert state[0, 0].flatten().tolist() == pytest.approx([x for row in expected for x in row])


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_a_state_stands_for_the_tokens_before(name):
    polynomial = POLYNOMIALS[name]
    q, k, v = problem(2, 11, 3, 4, 5)
    whole, after = naive.attention(q, k, v, polynomial, 0.5)
    first, state = naive.attention(q[:, :4], k[:, :4], v[:, :4], polynomial, 0.5)
    rest, last = naive.attention(q[:, 4:], k[:, 4:], v[:, 4:], polynomial, 0.5, state=state)
    assert torch.allclose(torch.cat([first, rest], dim=1), whole)
    assert torch.allclose(last, after)


def test_the_normaliser_runs_along_time_and_sums_to_one():
    q, k, v = problem(2, 9, 3, 4, 5)
    out, _ = naive.attention(q, k, torch.ones_like(v), REBASED, 0.5, eps=0.0)
    assert torch.allclose(out, torch.ones_like(out))


def test_masked_tokens_are_not_seen():
    q, k, v = problem(2, 9, 3, 4, 5)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    out, _ = naive.attention(q, k, v, BASED, 0.5, mask=mask)
    alone, _ = naive.attention(q[1:, 4:], k[1:, 4:], v[1:, 4:], BASED, 0.5)
    assert torch.allclose(out[1:, 4:], alone)
