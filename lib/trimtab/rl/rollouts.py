"""Sampling completions: what prompts begin with in common is computed once, the rest of each once for its whole group,
and finished rows leave the batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.interventions.model import attention_of
from trimtab.rl.cache import RoomyCache
from trimtab.rl.policy import Policy
from trimtab.rl.shapes import whole_blocks


@dataclass(frozen=True)
class Rollouts:
    """Groups of completions. A completion ends with its end-of-sequence token, or where it was cut off."""

    prompts: list[list[int]]
    completions: Int[Tensor, "prompts group time"]
    """Token ids; padding after the end."""
    mask: Bool[Tensor, "prompts group time"]
    """Which of them were generated, the end-of-sequence token included."""
    finished: Bool[Tensor, "prompts group"]
    """Whether the completion came to its end by itself."""
    log_probs: Float[Tensor, "prompts group time"]
    """Of the generated tokens, under the distribution that they were drawn from."""
    entropy: Float[Tensor, "prompts group time"]
    """Of that distribution, in nats."""

    @property
    def tokens(self) -> int:
        """Generated tokens of the whole batch."""
        return int(self.mask.sum())

    def completion(self, prompt: int, member: int, *, end: bool = False) -> list[int]:
        """The generated ids of one completion, without (or with) its end-of-sequence token."""
        ids = self.completions[prompt, member][self.mask[prompt, member]].tolist()
        return ids if end or not self.finished[prompt, member] else ids[:-1]


@torch.no_grad()
def rollout(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    group: int,
    max_new_tokens: int,
    temperature: float,
    end: Sequence[int],
    generator: torch.Generator | None = None,
) -> Rollouts:
    """`group` completions of each prompt (token ids), drawn at a temperature; 0 takes the likeliest token.

    `end`: ids that end a completion. Prompts are padded on the left, after the tokens that all of them begin with (a
    chat template's, say), and their keys and values are repeated for the group after one pass. Draws come from
    `generator`, on the CPU, so that one seed gives one result on any device.
    """
    device = policy.device
    rows, longest = len(prompts) * group, max(map(len, prompts))
    # Windows count padding, which must then stand before everything else.
    shared = 0 if attention_of(policy.view)[1] else _shared(prompts)
    cache = RoomyCache(longest + max_new_tokens)
    if shared:
        ids = torch.tensor([list(prompts[0][:shared])], device=device)
        policy.hidden(ids, torch.ones_like(ids), torch.arange(shared, device=device)[None], cache)
        cache.batch_repeat_interleave(len(prompts))
    ids = torch.zeros(len(prompts), longest - shared, dtype=torch.long)
    attend = torch.zeros(len(prompts), longest, dtype=torch.long)
    attend[:, :shared] = 1
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.tensor(prompt[shared:])
        attend[i, shared + longest - len(prompt) :] = 1
    positions = (attend.cumsum(1) - 1).clamp(min=0)[:, shared:]
    hidden = policy.hidden(ids.to(device), attend.to(device), positions.to(device), cache)[:, -1]
    cache.batch_repeat_interleave(group)
    hidden = hidden.repeat_interleave(group, dim=0)
    attend = attend.repeat_interleave(group, dim=0)
    place = attend.sum(1)  # position of the next token
    out = torch.zeros(rows, max_new_tokens, dtype=torch.long)
    mask = torch.zeros(rows, max_new_tokens, dtype=torch.bool)
    finished = torch.zeros(rows, dtype=torch.bool)
    log_probs, entropy = torch.zeros(2, rows, max_new_tokens)
    ends = torch.tensor(list(end))
    active = torch.arange(rows)  # rows that are still in the batch
    live = torch.ones(rows, dtype=torch.bool)  # which of them have not ended
    for t in range(max_new_tokens):
        token, log_prob, uncertainty = _next(policy.logits(hidden), temperature, generator)
        writing = active[live]
        out[writing, t] = token[live, 0]
        mask[writing, t] = True
        log_probs[writing, t], entropy[writing, t] = log_prob[live], uncertainty[live]
        done = torch.isin(token[:, 0], ends)
        finished[active[live & done]] = True
        live &= ~done
        if not bool(live.any()) or t == max_new_tokens - 1:
            break
        if (kept := _kept(live)) is not None:
            cache.batch_select_indices(kept.to(device))
            active, live, attend, place, token = (each[kept] for each in (active, live, attend, place, token))
        attend = torch.cat([attend, torch.ones(len(active), 1, dtype=torch.long)], dim=1)
        hidden = policy.hidden(token.to(device), attend.to(device), place[:, None].to(device), cache)[:, -1]
        place = place + 1
    shape = (len(prompts), group)
    used = int(mask.any(dim=0).sum())
    return Rollouts(
        [list(prompt) for prompt in prompts],
        out[:, :used].view(*shape, used),
        mask[:, :used].view(*shape, used),
        finished.view(shape),
        log_probs[:, :used].view(*shape, used),
        entropy[:, :used].view(*shape, used),
    )


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, the last token of none among them, for it predicts the first new one."""
    shortest = min(map(len, prompts))
    columns = enumerate(zip(*prompts, strict=False))
    return 0 if len(prompts) == 1 else next((i for i, ids in columns if i == shortest - 1 or len(set(ids)) > 1), 0)


def _kept(live: Bool[Tensor, " rows"]) -> Int[Tensor, " kept"] | None:
    """Which rows stay, in order: those that go on, filled up to whole blocks. None while all of them do."""
    size = whole_blocks(int(live.sum()))
    return None if size >= len(live) else live.int().argsort(descending=True, stable=True)[:size].sort().values


def _next(
    logits: Float[Tensor, "rows vocab"], temperature: float, generator: torch.Generator | None
) -> tuple[Int[Tensor, "rows 1"], Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """(a token for each row, its log-probability, the distribution's entropy), on the CPU, in fp32."""
    scaled = logits.to(torch.float32, copy=True)
    if temperature not in (0.0, 1.0):
        scaled /= temperature
    distribution = scaled.sub_(scaled.logsumexp(dim=1, keepdim=True)).cpu()
    probs = distribution.exp()
    token = draw(probs, generator) if temperature else distribution.argmax(dim=1, keepdim=True)
    entropy = -torch.einsum("rv,rv->r", probs, distribution)
    return token, distribution.gather(1, token)[:, 0], entropy


def draw(
    probs: Float[Tensor, "rows vocab"], generator: torch.Generator | None, block: int = 256
) -> Int[Tensor, "rows 1"]:
    """One index from each row, in proportion to its entries, by inversion: first the block of entries, then the entry.

    `torch.multinomial`, and one cumulative sum over a whole vocabulary, take several times as long.
    """
    rows, vocab = probs.shape
    if vocab % block:
        probs = nn.functional.pad(probs, (0, -vocab % block))
    blocks = probs.view(rows, -1, block)
    uniform = torch.rand(rows, 2, 1, generator=generator, dtype=torch.float64)
    at = _invert(blocks.sum(dim=2).double(), uniform[:, 0])
    within = blocks[torch.arange(rows), at[:, 0]].double()
    return at * block + _invert(within, uniform[:, 1])


def _invert(weights: Float[Tensor, "rows n"], uniform: Float[Tensor, "rows 1"]) -> Int[Tensor, "rows 1"]:
    """The first index whose cumulative weight exceeds that share of the whole; never one of weight 0."""
    cumulative = weights.cumsum(dim=1)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
