"""Continuations of fixed length by the decoders of Implicit Unlikelihood Training (Lagutin et al. 2021), and by those
that fight repetition without training.

One engine for any policy, a steered one too, which transformers' `generate` cannot run. The end-of-sequence token is a
token like any other, as in the paper: every continuation has full length, and nothing is padded.

Diverse beam search is left out: it has left transformers' core, so no well-kept implementation is there to test
against. So is alpha-entmax sampling, which only suits a model trained with the alpha-entmax loss.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers.generation import (
    LogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from trimtab.epochs import mix
from trimtab.errors import InputError
from trimtab.launch import in_worker
from trimtab.repetition.dry import DRYProcessor
from trimtab.repetition.searches import Growth, beam, contrastive
from trimtab.rl.policy import Policy
from trimtab.rl.rollouts import draw
from trimtab.validation import Span, read_name

FORMS: Mapping[str, Sequence[Span]] = {
    "greedy": [],
    "beam-N": [(1, 256)],
    "top-k-K": [(1, 1_000_000)],
    "nucleus-P": [(0.001, 1.0)],
    "sampling": [],
    "penalty-X": [(0.001, 100.0)],
    "no-repeat-N": [(1, 1000)],
    "dry": [],
    "contrastive-K-A": [(1, 256), (0.0, 1.0)],
}
"""How decoders are named, with the least and the largest value of each number; N and K are whole, P, X and A are
not."""


@dataclass(frozen=True)
class Decoder:
    """How continuations are chosen; `Decoder.of` reads one from its name. The last four choose greedily otherwise.

    `greedy`            the likeliest token
    `beam-N`            the likeliest sequence among N that grow together
    `top-k-K`           drawn from the K likeliest tokens
    `nucleus-P`         drawn from the fewest tokens that hold P of the probability
    `sampling`          drawn from all
    `penalty-X`         a positive logit of any token seen so far, the prefix's included as in transformers, is divided
                        by X, a negative one multiplied (CTRL, Keskar et al. 2019)
    `no-repeat-N`       no N-gram a second time, those of the prefix included
    `dry`               see `dry.DRYProcessor`
    `contrastive-K-A`   of the K likeliest v the largest (1 - A) p(v) - A max_j cos(h_v, h_j), over the final hidden
                        states h_j of all tokens so far (Su et al. 2022)
    """

    name: str
    kind: str
    """The name without its numbers."""
    count: int = 1
    """N or K."""
    value: float = 1.0
    """P, X or A."""

    @classmethod
    def of(cls, name: str) -> "Decoder":
        """From a name such as `top-k-8`. Raises InputError for one of no known form."""
        form, numbers = read_name(name, "a decoder", FORMS)
        given = dict(zip(re.findall("[A-Z]", form), numbers, strict=True))
        values = {"count" if letter in "NK" else "value": number for letter, number in given.items()}
        return cls(name, re.sub("-[A-Z]", "", form), **values)

    @property
    def alone(self) -> bool:
        """Whether it goes on token by token, each row by itself."""
        return self.kind not in ("beam", "contrastive")

    @property
    def samples(self) -> bool:
        """Whether it draws, so that a seed matters."""
        return self.kind in ("top-k", "nucleus", "sampling")

    def processor(self, breakers: Collection[int]) -> LogitsProcessor | None:
        """What changes the logits before the choice; None for nothing."""
        match self.kind:
            case "penalty":
                return RepetitionPenaltyLogitsProcessor(self.value)
            case "no-repeat":
                return NoRepeatNGramLogitsProcessor(self.count)
            case "dry":
                return DRYProcessor(breakers)
        return None


@torch.no_grad()
def continuations(
    policy: Policy,
    prefixes: Int[Tensor, "texts prefix"],
    tokens: int,
    decoder: Decoder,
    *,
    seed: int = 0,
    batch: int = 16,
    breakers: Collection[int] = (),
    show: bool = True,
) -> Int[Tensor, "texts time"]:
    """`tokens` ids that follow each prefix, which is left out; on the CPU.

    `batch`: texts decoded together; of each, beam search runs N rows and contrastive search K. What is drawn depends
    on `seed` and a text's place among `prefixes`, not on the batch. `breakers`: ids for `dry`, see `dry.breakers_of`.
    `show`: a bar of progress.
    """
    if tokens < 1 or batch < 1 or 0 in prefixes.shape:
        raise InputError(
            "continuations: prefixes, tokens and batch must not be empty or 0, "
            f"not {list(prefixes.shape)}, {tokens} and {batch}."
        )
    if decoder.alone:
        tasks = [(decoder, prefixes)]
        return together(policy, tasks, tokens, seed=seed, batch=batch, breakers=breakers, show=show)[0]
    found = []
    with _bar(len(prefixes) * tokens, decoder.name, show) as bar:
        for start in range(0, len(prefixes), batch):
            ids = prefixes[start : start + batch].to(policy.device, torch.long)
            growth = Growth(policy, ids, tokens, bar)
            if decoder.kind == "beam":
                grown = beam(growth, ids, tokens, decoder.count)
            else:
                grown = contrastive(growth, ids, tokens, decoder.count, decoder.value)
            found.append(grown[:, -tokens:].cpu())
    return torch.cat(found)


@torch.no_grad()
def together(
    policy: Policy,
    tasks: Sequence[tuple[Decoder, Int[Tensor, "_ prefix"]]],
    tokens: int,
    *,
    seed: int = 0,
    batch: int = 64,
    breakers: Collection[int] = (),
    show: bool = True,
) -> list[Int[Tensor, "_ time"]]:
    """`continuations` of each task, a decoder that chooses token by token with its prefixes, `batch` rows of whatever
    tasks at a time: on a CPU half of a step is the same however many rows there are. Raises InputError for beam and
    contrastive search."""
    wrong = [decoder.name for decoder, _ in tasks if not decoder.alone]
    if wrong or not tasks:
        raise InputError(f"together: {wrong[0] if wrong else 'nothing'} does not choose token by token.")
    choices = [
        _Choice(decoder, decoder.processor(breakers), torch.Generator().manual_seed(mix(seed, i)))
        for decoder, prefixes in tasks
        for i in range(len(prefixes))
    ]
    rows, found = torch.cat([prefixes for _, prefixes in tasks]), []
    title = ", ".join(dict.fromkeys(decoder.name for decoder, _ in tasks))
    with _bar(len(rows) * tokens, title, show) as bar:
        for start in range(0, len(rows), batch):
            ids = rows[start : start + batch].to(policy.device, torch.long)
            grown = _token_by_token(Growth(policy, ids, tokens, bar), ids, tokens, choices[start : start + batch])
            found.append(grown[:, -tokens:].cpu())
    return list(torch.cat(found).split([len(prefixes) for _, prefixes in tasks]))


def _bar(total: int, title: str, show: bool) -> tqdm:
    return tqdm(total=total, desc=title, unit="token", mininterval=1, disable=in_worker() or not show)


class _Choice(NamedTuple):
    """How one row goes on."""

    decoder: Decoder
    processor: LogitsProcessor | None
    generator: torch.Generator


HEAD, GROWTH = 256, 16
"""Likeliest tokens among which a nucleus is looked for first, and how many times more where they do not fill it:
sorting a whole vocabulary would take most of a step."""


def _next(
    ids: Int[Tensor, "rows seq"], logits: Float[Tensor, "rows vocab"], choices: Sequence[_Choice]
) -> Int[Tensor, "rows 1"]:
    """A token for each row; rows of one decoder that stand together are processed together."""
    parts, start = [], 0
    for _, run in groupby(choices, key=lambda choice: choice.decoder):
        group = list(run)
        some, past = logits[start : start + len(group)], ids[start : start + len(group)]
        start += len(group)
        decoder, processor = group[0].decoder, group[0].processor
        if processor is not None:
            some = processor(past, some)
        if decoder.samples:
            parts.append(_drawn(some, decoder, [choice.generator for choice in group]).to(ids.device))
        else:
            parts.append(some.argmax(dim=1, keepdim=True))
    return torch.cat(parts)


def _drawn(
    logits: Float[Tensor, "rows vocab"], decoder: Decoder, generators: Sequence[torch.Generator]
) -> Int[Tensor, "rows 1"]:
    """Drawn from the K likeliest tokens, from the fewest that hold P of the probability, or from all. What
    transformers' TopKLogitsWarper and TopPLogitsWarper leave, ties apart, without sorting the whole vocabulary."""
    probs, vocab, parts = logits.softmax(dim=1), logits.shape[1], []
    if decoder.kind == "sampling":
        return torch.cat([draw(row[None], generator) for row, generator in zip(probs.cpu(), generators, strict=True)])
    size = min(decoder.count if decoder.kind == "top-k" else HEAD, vocab)
    heads, found = (each.cpu() for each in probs.topk(size, dim=1))
    for row, head, tokens, generator in zip(probs, heads, found, generators, strict=True):
        if decoder.kind == "nucleus":
            while len(head) < vocab and head.sum() < decoder.value:
                head, tokens = (each.cpu() for each in row.topk(min(len(head) * GROWTH, vocab)))
            head = torch.where(head.cumsum(dim=0) - head < decoder.value, head, 0)
        parts.append(tokens[draw(head[None], generator)])
    return torch.cat(parts)


def _token_by_token(
    growth: Growth, ids: Int[Tensor, "texts prefix"], tokens: int, choices: Sequence[_Choice]
) -> Int[Tensor, "texts whole"]:
    """Each row by itself."""
    new = ids
    for _ in range(tokens):
        new = _next(ids, growth.logits(growth.read(new)[:, -1]), choices)
        ids = torch.cat([ids, new], dim=1)
    return ids
