"""Continuations that grow together: what they share, and the two searches that keep several of each text."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from trimtab.repetition.llama_step import LlamaStep
from trimtab.rl.cache import RoomyCache
from trimtab.rl.policy import Policy


class Growth:
    """Sequences of one length that grow together: what was computed for their earlier tokens is kept."""

    def __init__(self, policy: Policy, prefixes: Tensor, tokens: int, bar: tqdm) -> None:
        self.policy, self.bar, self.texts, self.seen = policy, bar, len(prefixes), 0
        self.prefix = prefixes.shape[1]
        self.cache = RoomyCache(self.prefix + tokens)
        self.step: LlamaStep | None = None

    def read(self, ids: Int[Tensor, "rows new"]) -> Float[Tensor, "rows new d_model"]:
        """Final hidden states of the next tokens, which are these."""
        rows, new = ids.shape
        if new == 1 and self.seen == self.prefix:  # the first of the steps that a LlamaStep packs weights for
            self.step = LlamaStep.of(self.policy, rows)
        if new == 1 and self.step is not None:
            self.seen += 1
            return self.step.hidden(ids[:, 0], self.seen - 1, self.cache)[:, None]
        positions = torch.arange(self.seen, self.seen + new, device=ids.device).expand(rows, -1)
        self.seen += new
        attend = torch.ones(rows, self.seen, dtype=torch.long, device=ids.device)
        return self.policy.hidden(ids, attend, positions, self.cache)

    def logits(self, hidden: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows vocab"]:
        """Of the token after these states, in fp32. Asked for once a step, so the bar moves."""
        self.bar.update(self.texts)
        return (self.policy.logits if self.step is None else self.step.logits)(hidden).float()


def beam(growth: Growth, ids: Int[Tensor, "texts prefix"], tokens: int, width: int) -> Int[Tensor, "texts whole"]:
    """The likeliest of `width` sequences. All have one length, so that no length penalty could change their order."""
    new, ids = ids, ids.repeat_interleave(width, dim=0)
    score = torch.full((growth.texts, width), -torch.inf, device=ids.device)
    score[:, 0] = 0  # the beams begin alike: only one may branch
    first = torch.arange(growth.texts, device=ids.device)[:, None] * width
    for step in range(tokens):
        hidden = growth.read(new)[:, -1]
        if step == 0:
            growth.cache.batch_repeat_interleave(width)
            hidden = hidden.repeat_interleave(width, dim=0)
        log_probs = growth.logits(hidden).log_softmax(dim=1)
        vocabulary = log_probs.shape[1]
        score, best = (score.view(-1, 1) + log_probs).view(growth.texts, -1).topk(width)
        parents = (first + best // vocabulary).flatten()
        new = (best % vocabulary).view(-1, 1)
        growth.cache.batch_select_indices(parents)
        ids = torch.cat([ids[parents], new], dim=1)
    return ids[first[:, 0]]


def contrastive(
    growth: Growth, ids: Int[Tensor, "texts prefix"], tokens: int, k: int, alpha: float
) -> Int[Tensor, "texts whole"]:
    """All k candidates of a step are read, each in a row of its own, and the chosen one is copied to the others."""
    hidden = growth.read(ids)
    growth.cache.batch_repeat_interleave(k)
    earlier, last = nn.functional.normalize(hidden.float(), dim=2), hidden[:, -1]
    text = torch.arange(growth.texts, device=ids.device)
    for _ in range(tokens):
        probs, candidates = growth.logits(last).softmax(dim=1).topk(k)
        states = growth.read(candidates.view(-1, 1)).view(growth.texts, k, -1)
        directions = nn.functional.normalize(states.float(), dim=2)
        degeneration = torch.einsum("tkd,tpd->tkp", directions, earlier).amax(dim=2)
        chosen = ((1 - alpha) * probs - alpha * degeneration).argmax(dim=1)
        growth.cache.batch_select_indices((text * k + chosen).repeat_interleave(k))
        ids = torch.cat([ids, candidates[text, chosen, None]], dim=1)
        earlier = torch.cat([earlier, directions[text, chosen, None]], dim=1)
        last = states[text, chosen]
    return ids
