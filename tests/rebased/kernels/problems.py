"""Random queries, keys and values, and what comparisons of kernels share."""

import torch

from trimtab.rebased.kernels import BASED, REBASED, Polynomial, naive

POLYNOMIALS = {"rebased": REBASED, "based": BASED, "lower": Polynomial(0.0, 0.05, 2.0)}


def problem(batch, time, heads, d_k, d_v, dtype=torch.float64, seed=0):
    """q, k, v."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, time, heads, d_k), (batch, time, heads, d_k), (batch, time, heads, d_v))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def with_gradients(attention, q, k, v, state, *args, **options):
    """(out, state after, and gradients of a random scalar of both in q, k, v and the state). With an eps that is seen:
    without one, a lone token's output does not depend on its query."""
    options = {"eps": 0.01} | options
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, *([] if state is None else [state]))]
    out, after = attention(*leaves[:3], *args, state=leaves[3] if state is not None else None, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)).sum()
        for t in (out, after)
    )
    return out.detach(), after.detach(), *torch.autograd.grad(loss, leaves)


def random_state(q, v, polynomial, seed=2):
    """The state after seven tokens."""
    k, u = problem(q.shape[0], 7, q.shape[2], q.shape[3], v.shape[3], torch.float64, seed)[1:]
    return naive.attention(k, k, u, polynomial, 0.5)[1]


def relative(a, b):
    """Error of a in norm, relative to b."""
    return float((a.double().cpu() - b.double().cpu()).norm() / b.double().norm().clamp(min=1e-30))
