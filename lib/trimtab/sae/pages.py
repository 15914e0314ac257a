"""One latent as a page: where it fires, what it promotes, and which latents are near it.

A card is one piece of HTML with inline styles only, which JupyterLab's sanitiser lets through, no scripts and nothing
fetched. It sets no text colour and no opaque background, so that it can be read in light and dark themes. All text
of documents and tokens passes through `markup.escaped`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from transformers import PreTrainedTokenizerBase

from trimtab.errors import InputError
from trimtab.interventions import capture, device_of, direct_logits, token_text
from trimtab.markup import escaped, whole_characters
from trimtab.sae.contexts import Contexts, Example
from trimtab.sae.model import SAE

if TYPE_CHECKING:
    from nnsight import TransformersModel

DENSE = 0.1
"""A latent that fires on a larger share of tokens is called dense."""
LISTED = 8
"""Contexts, tokens and neighbours on a card."""
LONGEST = 512
"""Tokens of a typed text that are read at most."""


class Piece(NamedTuple):
    """A token's text with its activation; tokens that share one character are one piece."""

    text: str
    activation: float


class Context(NamedTuple):
    """One window of text."""

    document: int
    first: int
    """Position of its first token in the document."""
    pieces: list[Piece]


@dataclass(frozen=True)
class Feature:
    """What is known of one latent."""

    latent: int
    origin: str
    """Which SAE it belongs to."""
    density: float
    """Share of tokens on which it fires."""
    median_rank: float
    """Of its firings, 1 being the largest activation of the token; NaN where it never fires."""
    k: int
    """Latents read per token."""
    contexts: list[Context]
    """With its largest activations, largest first."""
    promoted: list[tuple[str, float]]
    """Tokens with the largest direct logits (`interventions.direct_logits`)."""
    suppressed: list[tuple[str, float]]
    nearest: list[tuple[int, float]]
    """Other latents by cosine of decoder rows."""


class Features:
    """Looks up latents of one SAE."""

    def __init__(
        self,
        sae: SAE,
        contexts: Contexts,
        wrapped: "TransformersModel",
        tokenizer: PreTrainedTokenizerBase,
        *,
        origin: str,
    ) -> None:
        """`contexts` are of `sae`, which `origin` names on the cards."""
        self.sae, self.contexts, self.wrapped, self.tokenizer = sae, contexts, wrapped, tokenizer
        self.origin = origin
        self.density, self.median_rank = contexts.density(), contexts.median_rank()
        self._directions = F.normalize(sae.W_dec.detach().float(), dim=1)

    def __getitem__(self, latent: int) -> Feature:
        """Raises InputError for a latent that the SAE does not have."""
        if not 0 <= latent < self.sae.latents:
            raise InputError(f"{self.origin} has latents 0 to {self.sae.latents - 1}, not {latent}.")
        logits = direct_logits(self.wrapped, self.sae.W_dec[latent : latent + 1].detach())[0].cpu()
        cosines = self._directions @ self._directions[latent]
        cosines[latent] = -torch.inf
        near = cosines.topk(min(LISTED, self.sae.latents - 1))
        return Feature(
            latent,
            self.origin,
            float(self.density[latent]),
            float(self.median_rank[latent]),
            self.contexts.k,
            [self._context(example) for example in self.contexts.top(latent, LISTED)],
            self._extreme(logits),
            [(text, -value) for text, value in self._extreme(-logits)],
            list(zip(near.indices.tolist(), near.values.tolist(), strict=True)),
        )

    def _context(self, example: Example) -> Context:
        found = pieces(self.tokenizer, example.tokens, example.activations)
        return Context(example.document, int(example.positions[0]), found)

    def _extreme(self, logits: Float[torch.Tensor, " vocabulary"]) -> list[tuple[str, float]]:
        """Tokens of the largest logits; special tokens, and rows of the unembedding that are no token, left out."""
        allowed = torch.zeros_like(logits, dtype=torch.bool)
        allowed[: len(self.tokenizer)] = True
        added = [token for token, kind in self.tokenizer.added_tokens_decoder.items() if kind.special]
        allowed[added + self.tokenizer.all_special_ids] = False
        values, ids = torch.where(allowed, logits, -torch.inf).topk(min(LISTED, int(allowed.sum())))
        return [(token_text(self.tokenizer, i), v) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]


def pieces(
    tokenizer: PreTrainedTokenizerBase, tokens: Int[np.ndarray, " tokens"], activations: Float[np.ndarray, " tokens"]
) -> list[Piece]:
    """Text of each token in its context, together the text of the window; a character of several tokens is not torn.

    The activation of such a piece is its largest.
    """
    read = whole_characters(tokenizer, tokens.tolist())
    return [Piece(text, float(activations[some].max())) for some, text in read]


def card(feature: Feature) -> str:
    """The page of one latent."""
    peak = max((piece.activation for context in feature.contexts for piece in context.pieces), default=0.0)
    facts = [f"fires on {feature.density:.3%} of tokens" + (", dense" if feature.density > DENSE else "")]
    if feature.contexts:
        facts += [f"typical rank {feature.median_rank:.0f} of {feature.k}", f"largest activation {peak:.3g}"]
    shown = "".join(_context_row(context, peak) for context in feature.contexts) or "<div>It never fires.</div>"
    near = ", ".join(f"{latent}&nbsp;({cosine:.2f})" for latent, cosine in feature.nearest)
    return (
        '<div style="border: 1px solid rgba(128, 128, 128, 0.5); padding: 10px; margin: 8px 0px; max-width: 1000px">'
        f'<div><b style="font-size: 16px">Latent {feature.latent}</b>'
        f'<span style="opacity: 0.75"> &middot; {escaped(feature.origin)}</span></div>'
        f"<div>{' &middot; '.join(facts)}</div>"
        f"{_heading('Where it fires most (stronger colour: larger activation; bold: the largest of its line)')}{shown}"
        f"{_heading('Direct effect on the logits (final norm and unembedding only, centred)')}"
        f"<div>promotes {_token_list(feature.promoted)}</div><div>suppresses {_token_list(feature.suppressed)}</div>"
        f"{_heading('Nearest latents (cosine of decoder rows)')}<div>{near}</div></div>"
    )


def _heading(text: str) -> str:
    return f'<div style="margin: 8px 0px 2px 0px; opacity: 0.75">{text}</div>'


def _context_row(context: Context, peak: float) -> str:
    own = max(piece.activation for piece in context.pieces)
    text = "".join(_span(piece, peak, strongest=piece.activation == own) for piece in context.pieces)
    where = f"document {context.document}, from token {context.first}; activation {own:.3g}"
    return (
        f'<div title="{where}" dir="auto" style="white-space: pre-wrap; padding: 2px 0px; line-height: 1.5; '
        f'border-bottom: 1px solid rgba(128, 128, 128, 0.25)">{text}</div>'
    )


def _span(piece: Piece, peak: float, *, strongest: bool) -> str:
    text = escaped(piece.text)
    if piece.activation <= 0:
        return text
    # At most 0.55: black and white text both stay readable on it.
    alpha = 0.08 + 0.47 * piece.activation / peak
    style = f"background-color: rgba(230, 159, 0, {alpha:.2f})"
    inner = f"<b>{text}</b>" if strongest else text
    return f'<span title="{piece.activation:.3g}" style="{style}">{inner}</span>'


def _token_list(tokens: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{_boxed(text)}&nbsp;{value:+.2f}" for text, value in tokens)


def _boxed(text: str) -> str:
    """A token alone, in a box that shows where it begins and ends."""
    style = "white-space: pre-wrap; border: 1px solid rgba(128, 128, 128, 0.5)"
    return f'<span style="{style}">{escaped(text)}</span>'


class Fired(NamedTuple):
    """A token of a text, and the latents that fire on it."""

    text: str
    latents: list[tuple[int, float]]
    """(latent, activation), largest first; none at the first position of a pass, which no SAE was trained on."""


@torch.inference_mode()
def latents_in(
    text: str, sae: SAE, site: int, wrapped: "TransformersModel", tokenizer: PreTrainedTokenizerBase, k: int
) -> list[Fired]:
    """The k largest latents on each token of a text. Raises InputError for an empty text and one of over 512 tokens."""
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not 1 <= len(tokens) <= LONGEST:
        raise InputError(f"The text has {len(tokens)} tokens: give 1 to {LONGEST}.")
    lead = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = torch.tensor([lead + tokens], device=device_of(wrapped))
    residual = capture(wrapped, ids, torch.ones_like(ids), [site])[site][0, 1:]
    values, indices = sae.encode(residual.float().to(sae.W_dec.device), k)
    fired: list[list[tuple[int, float]]] = [] if lead else [[]]
    fired += [
        [(latent, value) for latent, value in zip(*row, strict=True) if value > 0]
        for row in zip(indices.tolist(), values.tolist(), strict=True)
    ]
    return [Fired(token_text(tokenizer, i), latents) for i, latents in zip(tokens, fired, strict=True)]


def table(fired: Sequence[Fired]) -> str:
    """`latents_in` as an HTML table, a row a token."""
    rows = "".join(
        f'<tr><td style="text-align: left">{_boxed(token.text)}</td>'
        f'<td style="text-align: left">{", ".join(f"{i}&nbsp;({v:.3g})" for i, v in token.latents)}</td></tr>'
        for token in fired
    )
    return (
        '<table><thead><tr><th style="text-align: left">token</th>'
        f'<th style="text-align: left">latents (activation)</th></tr></thead><tbody>{rows}</tbody></table>'
    )
