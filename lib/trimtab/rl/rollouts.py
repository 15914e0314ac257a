"""Sampling completions: each prompt is computed once for its whole group, and finished rows leave the batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache

from trimtab.rl.policy import Policy


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

    `end`: ids that end a completion. Prompts are padded on the left, and their keys and values are repeated for the
    group after one pass. Draws come from `generator`, on the CPU, so that one seed gives one result on any device.
    """
    device = policy.device
    rows, longest = len(prompts) * group, max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    attend = torch.zeros(len(prompts), longest, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        attend[i, longest - len(prompt) :] = 1
    positions = (attend.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache()
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
    for t in range(max_new_tokens):
        logits = policy.unembedding(hidden).float() / (temperature or 1.0)
        distribution = logits.log_softmax(dim=1).cpu()
        probs = distribution.exp()
        if temperature:
            # By inversion: torch.multinomial takes several times as long over a whole vocabulary.
            cumulative = probs.double().cumsum(dim=1)
            threshold = torch.rand(len(probs), 1, generator=generator, dtype=torch.float64) * cumulative[:, -1:]
            token = torch.searchsorted(cumulative, threshold, right=True)
        else:
            token = distribution.argmax(dim=1, keepdim=True)
        out[active, t] = token[:, 0]
        mask[active, t] = True
        log_probs[active, t] = distribution.gather(1, token)[:, 0]
        entropy[active, t] = -torch.einsum("rv,rv->r", probs, distribution)
        done = torch.isin(token[:, 0], ends)
        finished[active[done]] = True
        if bool(done.all()) or t == max_new_tokens - 1:
            break
        if bool(done.any()):
            going = ~done
            cache.batch_select_indices(going.nonzero().squeeze(1).to(device))
            active, attend, place, token = active[going], attend[going], place[going], token[going]
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
