"""Loops looked at: how a sentence's probability grows as it is repeated, and generations with repetition marked."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.errors import InputError
from trimtab.markup import escaped

Marked = tuple[Sequence[str], Sequence[bool]]
"""A text as pieces, and whether each is to be highlighted."""

_LINE = "1px solid rgba(128, 128, 128, 0.5)"
_CELL = f"text-align: left; vertical-align: top; padding: 4px 8px; border: {_LINE}"


def sentence_probability(
    nats_of: Callable[[list[int]], Float[Tensor, " tokens"]], sentences: Sequence[Sequence[int]], repeats: int
) -> Float[Tensor, "sentences repeats"]:
    """Token probability of each sentence at its 1st, 2nd, ... repeat, in the context of the repeats before it: the
    self-reinforcement of Xu et al. (NeurIPS 2022), fp64.

    `nats_of` gives -log p of every token of a list but the first, given all before it. Probabilities are geometric
    means, exp(-mean nats), over the sentence's tokens but its first, which has no context at the first repeat: so all
    repeats are read at the same tokens. Raises InputError for a sentence of fewer than two tokens and repeats < 1.
    """
    if repeats < 1 or any(len(sentence) < 2 for sentence in sentences):
        raise InputError("Repeats must be at least 1, and sentences have at least two tokens.")
    rows = []
    for sentence in sentences:
        nats = nats_of(list(sentence) * repeats).double().cpu()
        first = nats.new_zeros(1)
        by_repeat = torch.cat([first, nats]).view(repeats, len(sentence))
        rows.append((-by_repeat[:, 1:].mean(dim=1)).exp())
    return torch.stack(rows) if rows else torch.zeros(0, repeats, dtype=torch.float64)


def highlighted(pieces: Sequence[str], mask: Sequence[bool]) -> str:
    """A text as HTML, the pieces under the mask (`ngrams.repeated`) on a coloured ground that can be read in light and
    dark themes; styles are inline. A character of several tokens must be one piece."""
    style = "background-color: rgba(230, 159, 0, 0.35)"
    runs = groupby(zip(pieces, mask, strict=True), key=lambda pair: bool(pair[1]))
    texts = [(marked, escaped("".join(piece for piece, _ in run))) for marked, run in runs]
    return "".join(f'<span style="{style}">{text}</span>' if marked else text for marked, text in texts)


def side_by_side(prefixes: Sequence[str], columns: Mapping[str, Sequence[Marked]]) -> str:
    """Generations as an HTML table: a column for each arm, and for each prefix a row with the prefix across the top.
    Raises InputError where an arm has not a text for each prefix."""
    for arm, texts in columns.items():
        if len(texts) != len(prefixes):
            raise InputError(f"{arm} has {len(texts)} texts for {len(prefixes)} prefixes.")
    names = "".join(f'<th style="{_CELL}">{escaped(arm)}</th>' for arm in columns)
    rows = []
    for i, prefix in enumerate(prefixes):
        cells = "".join(_cell(highlighted(*texts[i])) for texts in columns.values())
        rows.append(f"<tr>{_cell(escaped(prefix), across=len(columns))}</tr><tr>{cells}</tr>")
    return (
        '<table style="border-collapse: collapse; table-layout: fixed; width: 100%">'
        f"<thead><tr>{names}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _cell(inner: str, *, across: int = 0) -> str:
    """`across`: columns that the cell of a prefix spans."""
    span, ground = (f' colspan="{across}"', "; background-color: rgba(128, 128, 128, 0.15)") if across else ("", "")
    style = f"{_CELL}; white-space: pre-wrap; overflow-wrap: anywhere{ground}"
    return f'<td{span} dir="auto" style="{style}">{inner}</td>'
