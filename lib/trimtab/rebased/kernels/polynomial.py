"""Similarities that are polynomials of the product of query and key, and the features whose inner product they are.

With s = scale q.k, Based (Arora et al. 2024) weighs a token by the Taylor expansion of exp, 1 + s + s^2 / 2; ReBased
(Aksenov et al. 2024, section 4) by s^2, of queries and keys that went through a learnt affine map. The features of the
square are the *outer product* of x with itself, d (d + 1) / 2 of them by symmetry, not its elementwise square.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Polynomial:
    """p(s) = constant + linear s + quadratic s^2, no coefficient negative; a weight for every s where linear^2 is at
    most 4 constant quadratic."""

    constant: float
    linear: float
    quadratic: float

    def __post_init__(self) -> None:
        if min(self.constant, self.linear, self.quadratic) < 0 or self.quadratic == 0:
            raise ValueError(f"A polynomial kernel takes coefficients >= 0 and some square, not {self}.")

    def __call__(self, s: Tensor) -> Tensor:
        """The weight of a token."""
        return self.constant + (self.linear + self.quadratic * s) * s if self.lower else self.quadratic * s * s

    def slope(self, s: Tensor) -> Tensor:
        """dp / ds."""
        return self.linear + 2 * self.quadratic * s

    @property
    def lower(self) -> bool:
        """Whether there are terms below the square."""
        return self.constant > 0 or self.linear > 0

    def below(self, width: int) -> int:
        """Features of the terms below the square, which come first."""
        return int(self.constant > 0) + width * int(self.linear > 0)

    def features(self, width: int) -> int:
        """How many features `expand` makes of vectors of this width."""
        return self.below(width) + width * (width + 1) // 2


BASED = Polynomial(1.0, 1.0, 0.5)
REBASED = Polynomial(0.0, 0.0, 1.0)


@functools.cache  # a step of decoding on a GPU would copy it there for every token
def bounding(polynomial: Polynomial, width: int, device: torch.device) -> Float[Tensor, " features"]:
    """w of `denominator`, in fp64: w.phi(x) >= |phi(x)|, with 1 for the constant and for each x_a^2, else 0."""
    with torch.inference_mode(False):  # whoever asks first, others may need it in a gradient
        w = torch.zeros(polynomial.features(width), dtype=torch.float64)
        if polynomial.constant:
            w[0] = 1
        first = torch.arange(width)
        w[polynomial.below(width) + first * width - first * (first - 1) // 2] = 1
        return w.to(device)


def expand(x: Float[Tensor, "*batch d_k"], polynomial: Polynomial, scale: float) -> Float[Tensor, "*batch features"]:
    """phi(x), such that phi(q) . phi(k) = p(scale q.k): [constant, x, x_a x_b for a <= b], each with its weight."""
    parts = []
    if polynomial.constant:
        parts.append(torch.full_like(x[..., :1], math.sqrt(polynomial.constant)))
    if polynomial.linear:
        parts.append(x * math.sqrt(polynomial.linear * scale))
    for a, weights in enumerate(_weights(x, polynomial, scale)):
        parts.append(x[..., a : a + 1] * x[..., a:] * weights)
    return torch.cat(parts, dim=-1)


def fold(
    gradient: Float[Tensor, "*batch features"], x: Float[Tensor, "*batch d_k"], polynomial: Polynomial, scale: float
) -> Float[Tensor, "*batch d_k"]:
    """The gradient in x, given that in `expand(x)`."""
    width = x.shape[-1]
    out, at = torch.zeros_like(x), polynomial.below(width)
    if polynomial.linear:
        out += gradient[..., at - width : at] * math.sqrt(polynomial.linear * scale)
    for a, weights in enumerate(_weights(x, polynomial, scale)):
        weighted = gradient[..., at : at + width - a] * weights
        out[..., a:] += weighted * x[..., a : a + 1]
        out[..., a] += (weighted * x[..., a:]).sum(dim=-1)
        at += width - a
    return out


def _weights(x: Tensor, polynomial: Polynomial, scale: float) -> Iterator[Tensor]:
    """Of x_a x_a, x_a x_(a + 1), ... for each a: products of two different entries stand for two."""
    weights = x.new_full((x.shape[-1],), scale * math.sqrt(2 * polynomial.quadratic))
    weights[0] /= math.sqrt(2)
    for a in range(x.shape[-1]):
        yield weights[: x.shape[-1] - a]
