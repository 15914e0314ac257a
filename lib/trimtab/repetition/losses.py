"""The losses on logits, each with its gradient at the logits: likelihood, unlikelihood, policy gradient.

Logits exist for a few tokens at a time: `accumulate` gathers the gradient at the hidden states chunk by chunk, and goes
through the model once.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.rl.policy import Policy

HEAD_TOKENS = 320
"""Tokens whose logits exist at one time: each such chunk adds to the whole gradient of the unembedding."""

Loss = Callable[[Float[Tensor, "tokens vocab"], slice], Float[Tensor, ""]]
"""From the logits of some of the predictions of a batch, row after row, and which of them they are."""


def accumulate(
    policy: Policy, rows: Int[Tensor, "batch seq"], first: int, loss: Loss | None
) -> tuple[float, Float[Tensor, " predictions"]]:
    """Add to the gradients those of the sum over chunks of `loss`, and return (that sum, log p of every token
    predicted).

    Predicted are the tokens of `rows` from place `first` on, each from all before it: batch x (seq - first) of them,
    row after row. Without a `loss` nothing is added, and no gradient is kept.
    """
    device, (batch, seq) = policy.device, rows.shape
    ids = rows[:, :-1].to(device)
    places = torch.arange(seq - 1, device=device).expand(batch, -1)
    with torch.set_grad_enabled(loss is not None):
        hidden = policy.hidden(ids, torch.ones_like(ids), places)[:, first - 1 :].flatten(0, 1)
    leaf = hidden.detach().requires_grad_(loss is not None)
    target = rows[:, first:].flatten().to(device)
    total, found = 0.0, []
    for start in range(0, len(target), HEAD_TOKENS):
        chunk = slice(start, min(start + HEAD_TOKENS, len(target)))
        with torch.set_grad_enabled(loss is not None):
            logits = policy.logits(leaf[chunk])
        found.append(target_log_probs(logits.detach(), target[chunk]))
        if loss is not None:
            value = loss(logits, chunk)
            if value.requires_grad:
                value.backward()
            total += value.item()
    if loss is not None and leaf.grad is not None and hidden.requires_grad:
        hidden.backward(leaf.grad)
    return total, torch.cat(found).cpu()


def target_log_probs(logits: Float[Tensor, "tokens vocab"], target: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """log softmax(logits) at the targets, in fp32."""
    scores = logits.float()
    return scores.gather(1, target[:, None])[:, 0] - scores.logsumexp(dim=1)


def weighted(
    logits: Float[Tensor, "tokens vocab"],
    target: Int[Tensor, " tokens"],
    likely: Float[Tensor, " tokens"],
    unlikely: Float[Tensor, " tokens"],
) -> Float[Tensor, ""]:
    """-sum(likely log p + unlikely log(1 - p)), p the probability of the target: with constant weights every loss on
    targets alone.

    - likelihood: likely = 1 / tokens;
    - policy gradient (REINFORCE): likely = advantage / tokens;
    - sequence unlikelihood (Welleck et al. 2020, eq. 5): unlikely = 1 / tokens where the token belongs to an n-gram
      that stood earlier in the continuation, else 0.

    log(1 - p) is the log of the sum of the others' shares, finite and with a finite gradient however near p is to 1.
    """
    return _Weighted.apply(logits, target, likely, unlikely)


class _Weighted(torch.autograd.Function):
    """d/dz_j of log p is 1[j = t] - q_j, and of log(1 - p) 1[j != t] exp(z_j - L_) - q_j, with L_ the log-sum-exp of
    all but the target: written down once, where autograd would pass over the logits many times."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, likely: Float[Tensor, " tokens"], unlikely: Float[Tensor, " tokens"]
    ) -> Float[Tensor, ""]:
        scores = logits.to(torch.float32, copy=True)
        at = target[:, None]
        chosen = scores.gather(1, at)
        others = scores.scatter_(1, at, -torch.inf).logsumexp(dim=1)
        chosen = chosen[:, 0]
        whole = torch.logaddexp(chosen, others)
        ctx.save_for_backward(logits, target, likely, unlikely, others, whole)
        return -(likely * (chosen - whole) + unlikely * (others - whole)).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        logits, target, likely, unlikely, others, whole = ctx.saved_tensors
        scores = logits.to(torch.float32, copy=True)
        at = target[:, None]
        chosen = scores.gather(1, at)
        # exp(z_j - L_) = q_j exp(whole - others): one pass for both terms.
        lifted = (whole - others).clamp(max=80).exp()  # beyond, q_j itself has long rounded to 0
        q = scores.sub_(whole[:, None]).exp_()
        q_target = (chosen[:, 0] - whole).exp()
        gradient = q.mul_((likely + unlikely - unlikely * lifted)[:, None])
        at_target = -likely * (1 - q_target) + unlikely * q_target
        gradient.scatter_(1, at, at_target[:, None])
        return (gradient.mul_(upstream)).to(logits.dtype), None, None, None


def token_unlikelihood(
    logits: Float[Tensor, "tokens vocab"], row: Int[Tensor, " seq"], places: Int[Tensor, " tokens"]
) -> Float[Tensor, ""]:
    """-sum over the predictions of one row of sum over its candidates c of log(1 - p(c)) (Welleck et al. 2020, eq. 4).

    Candidates of the token at `places[i]` are the distinct tokens before it in the same row, itself excepted: of that
    sample alone, never of others in the batch, and never padding, of which there is none.
    """
    row = row.to(logits.device)
    earlier = torch.arange(len(row), device=logits.device)[None] < places[:, None]
    candidates = earlier & first_of_kind(row)[None] & (row[None] != row[places][:, None])
    # In fp64 1 - p can be told from 0 until a candidate is some 35 nats ahead of all others.
    log_p = logits.double().log_softmax(dim=1)[:, row].clamp(max=-1e-15)
    penalty = -torch.log(-torch.expm1(log_p))
    return penalty.where(candidates, 0.0).sum().float()


def first_of_kind(row: Int[Tensor, " seq"]) -> Bool[Tensor, " seq"]:
    """Where a token stands for the first time."""
    same = row[:, None] == row[None]
    return ~same.tril(diagonal=-1).any(dim=1)
