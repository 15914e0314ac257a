"""Generation from a `LanguageModel`: one pass over the prompt, then a constant cost a token."""

import math

import torch
from jaxtyping import Int
from torch import Tensor

from trimtab.errors import InputError
from trimtab.rebased.model import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    end: int | None = None,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """New tokens for each prompt (token ids, of any lengths), up to `end`, which is left out.

    Temperature 0 takes the likeliest token. Without dropout, whatever mode the model is in. Raises InputError for an
    empty prompt, a temperature below 0 and a `top_k` below 1.
    """
    if not prompts or any(not prompt for prompt in prompts):
        raise InputError("generate: every prompt needs at least one token.")
    if not 0 <= temperature < math.inf:
        raise InputError(f"generate: `temperature` must be a number of 0 or more, not {temperature}.")
    if top_k is not None and top_k < 1:
        raise InputError(f"generate: `top_k` must be at least 1, or None for all tokens, not {top_k}.")
    training = model.training
    try:
        return _generate(model.eval(), prompts, max_new_tokens, temperature, top_k, end, generator)
    finally:
        model.train(training)


def _generate(
    model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    end: int | None,
    generator: torch.Generator | None,
) -> list[list[int]]:
    device = model.embedding.weight.device
    ids, mask = pad_left(prompts)
    cache = model.empty_cache()
    hidden = model.hidden(ids.to(device), None if bool(mask.all()) else mask.to(device), cache)[:, -1]
    found: list[list[int]] = [[] for _ in prompts]
    going = [True] * len(prompts)
    for number in range(1, max_new_tokens + 1):
        token = choose(model.unembed(hidden), temperature, top_k, generator)
        for i, new in enumerate(token.tolist()):
            going[i] = going[i] and new != end
            if going[i]:
                found[i].append(new)
        if not any(going) or number == max_new_tokens:
            break
        hidden = model.hidden(token[:, None], None, cache)[:, -1]
    return found


def pad_left(prompts: list[list[int]]) -> tuple[Int[Tensor, "batch time"], Tensor]:
    """(ids, mask): rows of one length, filled with 0 on the left; the mask is False there."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return ids, torch.arange(longest) >= longest - lengths[:, None]


def choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token for each row of logits."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1).cpu(), 1, generator=generator)[:, 0].to(logits.device)
