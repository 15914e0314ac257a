"""What mixes tokens in a block: a gated short convolution, softmax over a window, or polynomial attention.

Every mixer maps [batch, time, d_model] to the same shape, sees no later token, and, given a `cache`, continues where
the last call with it stopped. `mask` (False: padding on the left) keeps padding out of what tokens see.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.errors import InputError
from trimtab.rebased.kernels import BASED, EPS, REBASED, attention, step

Cache = dict[str, Tensor]
"""What one mixer carries from token to token; its size does not grow but for softmax without a window."""
Sequences = Float[Tensor, "batch time d_model"]
Mask = Bool[Tensor, "batch time"] | Int[Tensor, "batch time"] | None
ARMS = {
    "based": (False, False),
    "rebased": (True, True),
    "rebased-square": (False, False),
    "rebased-norm": (True, False),
    "rebased-affine": (False, True),
}
"""Arms of polynomial attention: whether queries and keys are normalised, and whether an affine map is learnt. Based's
kernel for the first, s^2 for the others: the paper's ablations x^2, norm(x)^2, (gamma x + beta)^2 and the whole."""


class BaseConv(nn.Module):
    """conv(x) * (W x) + x with a causal depthwise convolution of three tokens (zoology's BaseConv)."""

    def __init__(self, d_model: int, width: int = 3) -> None:
        super().__init__()
        self.width = width
        self.conv = nn.Conv1d(d_model, d_model, width, groups=d_model)
        self.projection = nn.Linear(d_model, d_model)

    def forward(self, x: Sequences, mask: Mask = None, cache: Cache | None = None) -> Sequences:
        """See the module's docstring."""
        if mask is not None:
            x = x * mask.bool()[..., None]
        before = x.new_zeros(x.shape[0], self.width - 1, x.shape[2])
        if cache is not None:
            before = cache.get("before", before)
        longer = torch.cat([before, x], dim=1)
        if cache is not None:
            cache["before"] = longer[:, 1 - self.width :]
        return self.conv(longer.transpose(1, 2)).transpose(1, 2) * self.projection(x) + x


class PolynomialAttention(nn.Module):
    """Linear attention with Based's or ReBased's kernel.

    `over`: what the norm is taken over, all heads together before they are split, as in the paper's code, or each head,
    as in flash-linear-attention, whose learnt map is also one for queries and keys of all heads alike; here it is the
    paper's: own gamma and beta for each channel of queries and of keys (equation 5). `eps`: added to the sum of
    weights; the papers' layers have 1e-12, flash-linear-attention's 1e-5, which a layer without a norm feels.
    """

    gamma_q: nn.Parameter | None
    beta_q: nn.Parameter | None
    gamma_k: nn.Parameter | None
    beta_k: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        heads: int = 1,
        d_k: int = 16,
        d_v: int | None = None,
        arm: str = "rebased",
        over: Literal["heads", "head"] = "heads",
        eps: float = EPS,
    ) -> None:
        super().__init__()
        if arm not in ARMS:
            raise InputError(f"{arm!r} is not an arm of polynomial attention: write one of {', '.join(ARMS)}.")
        if d_v is None and d_model % heads:
            raise InputError(f"{heads} heads do not divide d_model = {d_model}: give d_v.")
        self.heads, self.d_k, self.d_v = heads, d_k, d_v or d_model // heads
        self.polynomial = BASED if arm == "based" else REBASED
        self.normalised, affine = ARMS[arm]
        self.over = over
        self.eps = eps
        self.q = nn.Linear(d_model, heads * d_k, bias=False)
        self.k = nn.Linear(d_model, heads * d_k, bias=False)
        self.v = nn.Linear(d_model, heads * self.d_v, bias=False)
        self.out = nn.Linear(heads * self.d_v, d_model, bias=False)
        for name in ("q", "k"):
            gamma, beta = torch.ones(heads * d_k), torch.zeros(heads * d_k)
            self.register_parameter(f"gamma_{name}", nn.Parameter(gamma) if affine else None)
            self.register_parameter(f"beta_{name}", nn.Parameter(beta) if affine else None)

    def forward(self, x: Sequences, mask: Mask = None, cache: Cache | None = None) -> Sequences:
        """See the module's docstring."""
        q = self.mapped(self.q(x), self.gamma_q, self.beta_q)
        k = self.mapped(self.k(x), self.gamma_k, self.beta_k)
        v = self.v(x).unflatten(-1, (self.heads, self.d_v))
        mask = None if mask is None else mask.bool()
        learning = torch.is_grad_enabled() and any(each.requires_grad for each in (q, k, v))
        if cache is None:
            mixed, _ = attention(q, k, v, self.polynomial, mask=mask, eps=self.eps)
        elif "state" in cache and x.shape[1] == 1 and mask is None and not learning:
            token = (q[:, 0], k[:, 0], v[:, 0], self.polynomial, self.d_k**-0.5, cache["state"])
            mixed = step(*token, eps=self.eps)[:, None]
        else:
            state = cache.get("state")
            mixed, cache["state"] = attention(q, k, v, self.polynomial, mask=mask, state=state, eps=self.eps)
        return self.out(mixed.flatten(-2))

    def mapped(self, x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Float[Tensor, "batch time heads d_k"]:
        """gamma norm(x) + beta, split into heads."""
        if self.normalised:
            x = F.layer_norm(x if self.over == "heads" else x.unflatten(-1, (self.heads, self.d_k)),
                             (self.heads * self.d_k if self.over == "heads" else self.d_k,)).flatten(2)  # fmt: skip
        if gamma is not None and beta is not None:
            x = x * gamma + beta
        return x.unflatten(-1, (self.heads, self.d_k))
