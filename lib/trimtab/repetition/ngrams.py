"""Metrics of repeated n-grams, exact, over many continuations at once.

Texts are rows of token ids, padded at the end where `lengths` are given. An n-gram is told by the number of its first
half and that of its second, and so on down to tokens; pairs of numbers are numbered by sorting, so that nothing can
collide as hashes do.
"""

import re
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.errors import InputError

LEAST_WORDS = 4
"""Texts of fewer words are left out of metrics on words, as in Welleck et al.'s code."""
_WORD = re.compile(r"\w+|[^\w\s]|\n")


def gram_ids(tokens: Int[Tensor, "texts time"], n: int) -> Int[Tensor, "texts grams"]:
    """A number for the n-gram that begins at each of the first time - n + 1 places, equal for equal n-grams, across
    texts too. Raises InputError for n < 1 and token ids outside [0, 2^31)."""
    if n < 1:
        raise InputError(f"n-grams have at least one token, not {n}.")
    ids, size = tokens.long(), 1
    if ids.shape[1] < n or not ids.numel():
        return ids.new_zeros(len(ids), max(0, ids.shape[1] - n + 1))
    if ids.min() < 0 or ids.max() >= 2**31:
        raise InputError(f"Token ids must lie in [0, 2^31), not in [{ids.min()}, {ids.max()}].")
    while size < n:
        step = min(size, n - size)  # the halves may overlap: together they are the n-gram all the same
        pairs = ids[:, :-step] * (ids.max() + 1) + ids[:, step:]
        ids, size = pairs.unique(return_inverse=True)[1], size + step
    return ids


def seq_rep(
    tokens: Int[Tensor, "texts time"], n: int, lengths: Int[Tensor, " texts"] | None = None
) -> Float[Tensor, " texts"]:
    """seq-rep-n of each text, fp64: 1 - distinct n-grams / n-grams (Welleck et al. 2020, section 6). NaN for a text
    shorter than n: average with `nanmean`."""
    ids, whole = _grams(tokens, n, lengths)
    ordered = torch.where(whole, ids, -1).sort(dim=1).values
    # Places that hold no n-gram come first, as one run of -1 at most.
    new = (ordered[:, 1:] != ordered[:, :-1]).sum(dim=1) + (ordered[:, :1] >= 0).sum(dim=1)
    return 1 - new.double() / whole.sum(dim=1)


def repeated(
    tokens: Int[Tensor, "texts time"], n: int, lengths: Int[Tensor, " texts"] | None = None
) -> Bool[Tensor, "texts time"]:
    """Every token of an n-gram that stood earlier in the same text, be it overlapping: what sequence-level unlikelihood
    penalises. The last n-gram is checked too, which the published loop leaves out."""
    ids, whole = _grams(tokens, n, lengths)
    ordered, place = torch.where(whole, ids, -1).sort(dim=1, stable=True)
    again = torch.zeros_like(whole)
    again[:, 1:] = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    begins = torch.zeros_like(whole).scatter_(1, place, again)
    found = torch.zeros_like(tokens, dtype=torch.bool)
    for offset in range(n if begins.shape[1] else 0):
        found[:, offset : offset + begins.shape[1]] |= begins
    return found


def reward(
    tokens: Int[Tensor, "texts time"], n: int, lengths: Int[Tensor, " texts"] | None = None
) -> Float[Tensor, " texts"]:
    """1 - seq-rep-n, fp32 (2101.04229): 1 is best. A text too short for one n-gram gets 0, the worst, so that ending
    early cannot win."""
    return (1 - seq_rep(tokens, n, lengths)).nan_to_num(0.0).float()


def distinct(tokens: Int[Tensor, "texts time"], n: int, lengths: Int[Tensor, " texts"] | None = None) -> float:
    """distinct-n: distinct n-grams / n-grams of all texts pooled (Li et al. 2016); falls with the number of texts. NaN
    where there are none."""
    ids, whole = _grams(tokens, n, lengths)
    found = ids[whole]
    return found.unique().numel() / found.numel() if found.numel() else float("nan")


def uniq_seq(tokens: Int[Tensor, "texts time"], lengths: Int[Tensor, " texts"] | None = None) -> int:
    """Distinct tokens over all texts together."""
    ids, whole = _grams(tokens, 1, lengths)
    return ids[whole].unique().numel()


def words(text: str) -> list[str]:
    """Runs of word characters, single marks of punctuation, and newlines; other white space is dropped."""
    return _WORD.findall(text)


def as_ids(lists: Sequence[Sequence[str]]) -> tuple[Int[Tensor, "texts time"], Int[Tensor, " texts"]]:
    """(ids, lengths) of the words of many texts, numbered alike in all and padded with 0, for the metrics above. A text
    of fewer than `LEAST_WORDS` words has length 0, so that they leave it out."""
    numbers: dict[str, int] = {}
    rows = [[numbers.setdefault(word, len(numbers)) for word in each] for each in lists]
    lengths = torch.tensor([len(row) if len(row) >= LEAST_WORDS else 0 for row in rows], dtype=torch.int64)
    width = max(map(len, rows), default=0)
    padded = [row + [0] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), width), lengths


def longest_repeat(tokens: Int[Tensor, "texts time"]) -> Int[Tensor, " texts"]:
    """Tokens of the longest substring that occurs twice in a text, the two occurrences overlapping or not: time - 1
    for one token over and over."""
    texts, time = tokens.shape
    longest = tokens.new_zeros(texts, dtype=torch.int64)
    # common[i, j + 1]: tokens that the text up to place t and the text up to place j < t end in alike.
    common = torch.zeros(texts, time + 1, dtype=torch.int32, device=tokens.device)
    for t in range(1, time):
        common[:, 1 : t + 1] = (common[:, :t] + 1) * (tokens[:, :t] == tokens[:, t : t + 1])
        longest = torch.maximum(longest, common[:, 1 : t + 1].amax(dim=1))
    return longest


def periodic_tail(tokens: Int[Tensor, "texts time"], least: int = 3) -> Bool[Tensor, " texts"]:
    """Whether a text ends in a loop: one unit, of any length up to time // least, at least `least` times in a row.
    Raises InputError for least < 2."""
    if least < 2:
        raise InputError(f"A loop is at least two rounds of one unit, not {least}.")
    texts, time = tokens.shape
    found = torch.zeros(texts, dtype=torch.bool, device=tokens.device)
    for unit in range(1, time // least + 1):
        tail = tokens[:, time - least * unit :]
        found |= (tail[:, unit:] == tail[:, :-unit]).all(dim=1)
    return found


def _grams(
    tokens: Int[Tensor, "texts time"], n: int, lengths: Int[Tensor, " texts"] | None
) -> tuple[Int[Tensor, "texts grams"], Bool[Tensor, "texts grams"]]:
    """`gram_ids`, and which of them lie within their text. Raises InputError for lengths that are none."""
    time = tokens.shape[1]
    if lengths is None:
        ids = gram_ids(tokens, n)
        return ids, torch.ones_like(ids, dtype=torch.bool)
    if lengths.numel() and (lengths.min() < 0 or lengths.max() > time):
        raise InputError(f"Lengths must lie between 0 and the {time} places of a row.")
    place, ends = torch.arange(time, device=tokens.device), lengths[:, None]
    ids = gram_ids(torch.where(place < ends, tokens, 0), n)
    return ids, place[: ids.shape[1]] + n <= ends
