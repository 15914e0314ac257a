"""What the heat maps of the logit lens hold, before any library draws them: layers upwards, tokens to the right, and in
each cell the most probable next token."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trimtab.errors import InputError
from trimtab.interventions import NO_TARGET, Lens, LensComparison, token_text

Colour = Literal["probability", "entropy", "kl", "target"]
"""What a lens's colours are: the top token's probability, the entropy, KL(final || layer), the target's probability."""
Difference = Literal["kl", "target"]
"""What the colours of a difference are: KL(steered || clean), or the change of the target's log-probability."""
LABELS = {
    "probability": "probability of the top token",
    "entropy": "entropy (nats)",
    "kl": "KL(final || layer) (nats)",
    "target": "probability of the target",
}


@dataclass(frozen=True)
class Panel:
    """One heat map, for either library."""

    title: str
    label: str
    """What the colours are, with the unit."""
    values: Float[np.ndarray, "layers positions"]
    limits: tuple[float, float]
    layers: tuple[int, ...]
    tokens: list[str]
    """The token read at each position."""
    cells: list[list[str]]
    hover: list[list[list[str]]]
    """Lines of text, unescaped."""

    @property
    def colours(self) -> str:
        """A map for values of one sign, or of both; both libraries know these by name."""
        return "RdBu" if self.limits[0] < 0 else "Blues"


def shown(text: str, longest: int | None = None) -> str:
    """A token with its white space made visible, and without control characters and marks that reorder or hide
    text; cut after `longest` characters."""

    def show(character: str) -> str:
        if character in " \n\t":
            return {" ": "␣", "\n": "↵", "\t": "⇥"}[character]
        return f"[U+{ord(character):04X}]" if unicodedata.category(character)[0] in "CZ" else character

    spelled = "".join(map(show, text))
    return spelled if longest is None or len(spelled) <= longest else spelled[: longest - 1] + "…"


def lens_panel(
    found: Lens,
    tokenizer: PreTrainedTokenizerBase,
    *,
    colour: Colour = "probability",
    row: int = 0,
    positions: Sequence[int] | None = None,
    title: str = "Logit lens",
) -> Panel:
    """The heat map of one text of a lens. `positions`: which tokens, all by default, but for padding.

    Raises InputError for `target` where the lens has none, and for positions that the text does not have.
    """
    where = _positions(found, row, positions)
    targets = found.targets[row, where]
    if colour == "target" and not bool((targets != NO_TARGET).any()):
        raise InputError("The lens was given no target for these positions: pass `targets` to it.")
    values = {
        "probability": found.top_probabilities[..., 0],
        "entropy": found.entropy,
        "kl": found.kl,
        "target": found.target_probability,
    }[colour][:, row, where]
    limits = (0.0, 1.0) if colour in ("probability", "target") else (0.0, _largest(values))
    text = _Spelling(tokenizer)
    cells = [[text[i] for i in line] for line in found.top_ids[:, row, where, 0].tolist()]
    hover = [[_hover(found, text, layer, row, p) for p in where] for layer in range(len(found.layers))]
    tokens = [text[i] for i in found.input_ids[row, where].tolist()]
    return Panel(title, LABELS[colour], values.numpy(), limits, found.layers, tokens, cells, hover)


def difference_panel(
    found: LensComparison,
    tokenizer: PreTrainedTokenizerBase,
    *,
    colour: Difference = "kl",
    row: int = 0,
    positions: Sequence[int] | None = None,
    title: str = "Steered against clean",
) -> Panel:
    """The heat map of what steering changed; a cell names the steered model's top token where it is another."""
    where = _positions(found.clean, row, positions)
    kl, change = found.kl[:, row, where], found.target_change[:, row, where]
    if colour == "target" and bool(change.isnan().all()):
        raise InputError("The lenses were given no target for these positions: pass `targets` to them.")
    largest = _largest(kl if colour == "kl" else change.abs())
    text = _Spelling(tokenizer)
    tops = [lens.top_ids[:, row, where, 0].tolist() for lens in (found.clean, found.steered)]
    pairs = [list(zip(*lines, strict=True)) for lines in zip(*tops, strict=True)]
    hover = [
        [
            [
                f"clean {shown(text[clean])}, steered {shown(text[steered])}",
                f"KL(steered || clean) {float(kl[i, j]):.3g} nats",
                *([] if change[i, j].isnan() else [f"target's log-probability {float(change[i, j]):+.3g} nats"]),
            ]
            for j, (clean, steered) in enumerate(line)
        ]
        for i, line in enumerate(pairs)
    ]
    return Panel(
        title,
        "KL(steered || clean) (nats)" if colour == "kl" else "change of the target's log-probability (nats)",
        (kl if colour == "kl" else change).numpy(),
        (0.0 if colour == "kl" else -largest, largest),
        found.clean.layers,
        [text[i] for i in found.clean.input_ids[row, where].tolist()],
        [["" if clean == steered else text[steered] for clean, steered in line] for line in pairs],
        hover,
    )


def comparison_panels(
    found: LensComparison,
    tokenizer: PreTrainedTokenizerBase,
    *,
    colour: Colour = "probability",
    difference: Difference = "kl",
    row: int = 0,
    positions: Sequence[int] | None = None,
) -> list[Panel]:
    """Clean, steered (on one scale of colours) and their difference."""
    sides = [
        lens_panel(lens, tokenizer, colour=colour, row=row, positions=positions, title=title)
        for title, lens in (("Clean", found.clean), ("Steered", found.steered))
    ]
    limits = (0.0, max(side.limits[1] for side in sides))
    change = difference_panel(found, tokenizer, colour=difference, row=row, positions=positions)
    return [*(replace(side, limits=limits) for side in sides), change]


class _Spelling(dict[int, str]):
    """Texts of tokens, each looked up once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        self[token] = token_text(self.tokenizer, token)
        return self[token]


def _hover(found: Lens, text: _Spelling, layer: int, row: int, position: int) -> list[str]:
    ids, probabilities = found.top_ids[layer, row, position], found.top_probabilities[layer, row, position]
    lines = [f"after block {found.layers[layer]}, position {position}"]
    lines += [f"{p:.3f} {shown(text[i])}" for i, p in zip(ids.tolist(), probabilities.tolist(), strict=True)]
    entropy, kl = float(found.entropy[layer, row, position]), float(found.kl[layer, row, position])
    lines.append(f"entropy {entropy:.2f}, KL(final || layer) {kl:.2f} nats")
    target = int(found.targets[row, position])
    if target != NO_TARGET:
        probability = float(found.target_probability[layer, row, position])
        rank = int(found.target_rank[layer, row, position])
        lines.append(f"target {shown(text[target])}: rank {rank}, probability {probability:.3g}")
    return lines


def _positions(found: Lens, row: int, positions: Sequence[int] | None) -> list[int]:
    """The positions asked for, or all that are not padding."""
    if not 0 <= row < len(found.input_ids):
        raise InputError(f"The lens has texts 0 to {len(found.input_ids) - 1}, not {row}.")
    held = found.attention_mask[row].nonzero().flatten().tolist()
    wanted = held if positions is None else list(positions)
    wrong = sorted(set(wanted) - set(held))
    if wrong or not wanted:
        raise InputError(f"The text has positions {held[0]} to {held[-1]}, not {wrong or 'none'}.")
    return wanted


def _largest(values: Tensor) -> float:
    """The upper end of a scale of colours: never 0, which would be no scale."""
    return max(float(values.nan_to_num(0.0).max()), 1e-6)
