"""The policy gradient of a batch of rollouts, in one pass over every prompt and the completions of its group.

A prompt and its completions are packed into one row, each completion seeing the prompt and itself alone, so that the
prompt is computed once; the unembedding runs on completion tokens only, a few hundred at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.errors import InputError
from trimtab.interventions import Head
from trimtab.rl.policy import Policy
from trimtab.rl.rollouts import Rollouts
from trimtab.rl.shapes import whole_blocks
from trimtab.rows import first_line

HEAD_TOKENS = 64
"""Completion tokens whose logits exist at one time, a whole number of blocks of `rl.shapes`."""


class Packed(NamedTuple):
    """Prompts with their completions, a prompt to a row; the last token of a completion is predicted, not read."""

    ids: Int[Tensor, "rows seq"]
    mask: Bool[Tensor, "rows 1 seq seq"]
    positions: Int[Tensor, "rows seq"]
    row: Int[Tensor, " tokens"]
    """For each generated token, where the hidden state that predicts it is: its row ..."""
    place: Int[Tensor, " tokens"]
    """... and its place in the row."""
    target: Int[Tensor, " tokens"]
    """The generated token itself."""
    source: Int[Tensor, "tokens 3"]
    """And where it stands in the rollouts: prompt, member of the group, time."""


@dataclass(frozen=True)
class Terms:
    """What a token's loss is made of; all but `log_probs` are constants."""

    log_probs: Float[Tensor, " tokens"]
    advantages: Float[Tensor, " tokens"]
    old: Float[Tensor, " tokens"] | None = None
    """Log-probabilities when the tokens were drawn, for importance ratios; None while the policy is the same."""
    reference: Float[Tensor, " tokens"] | None = None
    """Log-probabilities under the reference model, for the KL penalty."""


def pack(rollouts: Rollouts, prompts: Sequence[int]) -> Packed:
    """Rows for the given prompts of a batch of rollouts, each as long as the longest of them, to whole blocks."""
    rows: list[list[int]] = []
    segments: list[list[int]] = []
    positions: list[list[int]] = []
    row_of: list[int] = []
    place: list[int] = []
    target: list[int] = []
    source: list[tuple[int, int, int]] = []
    for row, p in enumerate(prompts):
        prompt = rollouts.prompts[p]
        ids, segment, position = list(prompt), [0] * len(prompt), list(range(len(prompt)))
        for member in range(rollouts.mask.shape[1]):
            generated = rollouts.completion(p, member, end=True)
            # The first token is predicted by the prompt's last, each further one by the token before it.
            place += [len(prompt) - 1, *range(len(ids), len(ids) + len(generated) - 1)]
            ids += generated[:-1]
            segment += [member + 1] * (len(generated) - 1)
            position += range(len(prompt), len(prompt) + len(generated) - 1)
            target += generated
            row_of += [row] * len(generated)
            source += [(p, member, t) for t in range(len(generated))]
        rows.append(ids)
        segments.append(segment)
        positions.append(position)
    width = whole_blocks(max(map(len, rows)))

    def padded(lists: Sequence[Sequence[int]], filler: int) -> Tensor:
        return torch.tensor([[*each, *[filler] * (width - len(each))] for each in lists])

    belongs = padded(segments, -1)
    key, query = belongs[:, None, :], belongs[:, :, None]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    # Padding attends to itself, for a softmax over nothing is not a number.
    allowed = causal & ((key == 0) | (key == query))
    return Packed(
        padded(rows, 0), allowed[:, None], padded(positions, 0),
        torch.tensor(row_of), torch.tensor(place), torch.tensor(target), torch.tensor(source),
    )  # fmt: skip


@torch.no_grad()
def check_packing(policy: Policy) -> None:
    """Raise InputError unless the model computes packed rows as it computes each text alone, tried on a few tokens.
    Models that take positions from the mask, as with ALiBi, do not."""
    if policy.view._module in _PACKABLE:
        return
    size = policy.view._module.config.get_text_config().vocab_size
    completions = torch.arange(12).view(2, 2, 3) * 7 % size
    mask = torch.ones(2, 2, 3, dtype=torch.bool)
    mask[0, 1, 2] = mask[1, 0, 1] = mask[1, 0, 2] = False
    nothing = torch.zeros(2, 2, 3)
    drawn = Rollouts([[i % size for i in (1, 2, 3)], [4 % size]], completions, mask, mask[:, :, 0], nothing, nothing)
    name = type(policy.view._module).__name__
    try:
        packed = pack(drawn, [0, 1])
        apart = token_log_probs(policy, packed, 1.0) - torch.cat([_alone(policy, drawn, p, m) for p, m in PLACES])
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise InputError(f"{name} takes no pattern of attention, which training needs: {first_line(error)}") from error
    if not apart.abs().max() <= (1e-3 if policy.view._module.dtype == torch.float32 else 0.3):
        raise InputError(
            f"{name} computes completions packed beside one another otherwise than alone (log-probabilities differ by "
            f"{apart.abs().max():.2g}), so it cannot be trained here."
        )
    _PACKABLE.add(policy.view._module)


PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))
_PACKABLE: WeakSet[nn.Module] = WeakSet()


def _alone(policy: Policy, drawn: Rollouts, prompt: int, member: int) -> Float[Tensor, " tokens"]:
    """log p of one completion's tokens, in a pass of its own."""
    generated = torch.tensor(drawn.completion(prompt, member, end=True), device=policy.device)
    ids = torch.cat([torch.tensor(drawn.prompts[prompt], device=policy.device), generated])[None]
    hidden = policy.hidden(ids, torch.ones_like(ids), torch.arange(ids.shape[1], device=policy.device)[None])
    logits = policy.logits(hidden[0, -len(generated) - 1 : -1]).float()
    return logits.log_softmax(dim=1).gather(1, generated[:, None])[:, 0]


def token_log_probs(
    policy: Policy, packed: Packed, temperature: float, *, reference: bool = False
) -> Float[Tensor, " tokens"]:
    """log p of every generated token at a temperature, without gradients."""
    with torch.no_grad():
        flat = _predicting(policy, packed, reference=reference)
        target = packed.target.to(flat.device)
        head = policy.reference_logits if reference else policy.logits
        chunks = [
            _log_probs(head, hidden, chosen, temperature)
            for hidden, chosen in zip(flat.split(HEAD_TOKENS), target.split(HEAD_TOKENS), strict=True)
        ]
    return torch.cat(chunks)


def accumulate(
    policy: Policy,
    packed: Packed,
    temperature: float,
    loss: Callable[[Float[Tensor, " tokens"], slice], Float[Tensor, ""]],
) -> float:
    """Add to the gradients those of the sum over chunks of loss(log-probabilities, slice of tokens). Returns the sum.

    Logits exist for one chunk at a time: the gradient at the hidden states is gathered chunk by chunk, and goes through
    the model once.
    """
    flat = _predicting(policy, packed)
    leaf = flat.detach().requires_grad_()
    target = packed.target.to(flat.device)
    total = 0.0
    for start in range(0, len(target), HEAD_TOKENS):
        chunk = slice(start, min(start + HEAD_TOKENS, len(target)))
        value = loss(_log_probs(policy.logits, leaf[chunk], target[chunk], temperature), chunk)
        value.backward()
        total += value.item()
    if flat.requires_grad and leaf.grad is not None:
        flat.backward(leaf.grad)
    return total


def surrogate(terms: Terms, clip: float | None, kl: float) -> Float[Tensor, " tokens"]:
    """Each token's loss: -A log p while the policy is the one that drew it; else -min(r A, clip(r, 1 -+ clip) A) with
    r = p / p_old (PPO). With `kl` > 0, plus kl (p_ref / p - 1 - log(p_ref / p)), an unbiased estimate of
    KL(p || p_ref) (Schulman's k3)."""
    if terms.old is None:
        loss = -terms.advantages * terms.log_probs
    else:
        ratio = (terms.log_probs - terms.old).exp()
        loss = -ratio * terms.advantages
        if clip is not None:
            loss = torch.maximum(loss, -ratio.clamp(1 - clip, 1 + clip) * terms.advantages)
    if kl > 0 and terms.reference is not None:
        apart = terms.reference - terms.log_probs
        loss = loss + kl * (apart.exp() - 1 - apart)
    return loss


def _predicting(policy: Policy, packed: Packed, *, reference: bool = False) -> Float[Tensor, "tokens d_model"]:
    device = policy.device
    run = policy.reference_hidden if reference else policy.hidden
    hidden = run(packed.ids.to(device), packed.mask.to(device), packed.positions.to(device))
    return hidden[packed.row.to(device), packed.place.to(device)]


def _log_probs(
    head: Head, hidden: Float[Tensor, "tokens d_model"], target: Int[Tensor, " tokens"], temperature: float
) -> Float[Tensor, " tokens"]:
    filled = nn.functional.pad(hidden, (0, 0, 0, whole_blocks(len(hidden)) - len(hidden)))
    return _TargetLogProbs.apply(head(filled)[: len(hidden)], target, temperature)


class _TargetLogProbs(torch.autograd.Function):
    """log softmax(logits / T) at the targets, in fp32. Its gradient, (1[target] - softmax) / T, is written down once,
    where autograd would pass over all logits several times."""

    @staticmethod
    def forward(
        ctx: Any, logits: Float[Tensor, "tokens vocab"], target: Int[Tensor, " tokens"], temperature: float
    ) -> Float[Tensor, " tokens"]:
        scaled = logits.to(torch.float32, copy=True).div_(temperature)
        total = scaled.logsumexp(dim=1)
        ctx.save_for_backward(logits, target, total)
        ctx.temperature = temperature
        return scaled.gather(1, target[:, None])[:, 0] - total

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, " tokens"]) -> tuple[Tensor, None, None]:
        logits, target, total = ctx.saved_tensors
        gradient = gradient[:, None] / ctx.temperature
        at_logits = logits.to(torch.float32, copy=True).div_(ctx.temperature)
        at_logits.sub_(total[:, None]).exp_().mul_(-gradient)
        at_logits.scatter_add_(1, target[:, None], gradient)
        return at_logits.to(logits.dtype), None, None
