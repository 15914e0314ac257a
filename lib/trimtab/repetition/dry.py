"""Don't Repeat Yourself: a decoding-time penalty on what would prolong a repetition."""

from collections.abc import Collection

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import LogitsProcessor

BREAKERS = ("\n", ":", '"', "*")
"""What ends a repetition for DRY: lists, dialogue and mark-up repeat rightly."""


def breakers_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of all tokens in whose text one of `BREAKERS` stands."""
    texts = (tokenizer.decode([token]) for token in range(len(tokenizer)))
    return [token for token, text in enumerate(texts) if any(breaker in text for breaker in BREAKERS)]


class DRYProcessor(LogitsProcessor):
    """Don't Repeat Yourself: a token that would prolong a repetition loses the more, the longer that already is.

    logit(v) -= 0.8 * 1.75^(m - 2) where m >= 2 is the most tokens at the end, none of them a breaker, that also stand
    before an earlier v, prefix included. Breakers themselves lose nothing. As in text-generation-webui (#5677) and
    llama.cpp (#9702), with the values common there; as in the former m counts to `longest`.
    """

    multiplier = 0.8
    base = 1.75
    allowed = 2
    longest = 50

    def __init__(self, breakers: Collection[int]) -> None:
        self.breakers = torch.tensor(sorted(breakers), dtype=torch.long)

    def __call__(self, input_ids: Int[Tensor, "rows seq"], scores: Float[Tensor, "rows vocab"]) -> Tensor:
        """The logits less their penalties."""
        breaks = torch.isin(input_ids, self.breakers.to(input_ids.device))
        before, after = input_ids[:, :-1], input_ids[:, 1:]
        alike = torch.ones_like(before, dtype=torch.bool)  # whether the last `back` tokens stand up to there
        length = torch.zeros_like(before)
        for back in range(min(self.longest, before.shape[1])):
            place = before.shape[1] - back
            alike[:, :back] = False
            alike[:, back:] &= (before[:, :place] == input_ids[:, place, None]) & ~breaks[:, place, None]
            if not bool(alike.any()):
                break
            length += alike
        penalty = self.multiplier * self.base ** (length - self.allowed).to(scores.dtype)
        penalty = penalty.masked_fill((length < self.allowed) | breaks[:, 1:], 0)
        return scores - torch.zeros_like(scores).scatter_reduce(1, after, penalty, "amax")
