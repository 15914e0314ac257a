"""The logit lens: what the model would predict if it stopped after each of its blocks.

The residual stream h_l after block l is read as the last one is: logits = head(final_norm(h_l)), with the model's own
head, its scale and cap included. Only statistics of the distributions leave this file;
the distributions themselves exist for a few positions of one layer at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl
import torch
from jaxtyping import Float, Int
from nnsight import TransformersModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trimtab.errors import InputError
from trimtab.interventions.model import blocks_of, check_sites
from trimtab.interventions.readout import Readout, token_text

NO_TARGET = -100
"""Stands in `targets` where a position has none, as in the labels of transformers."""
AT_ONCE = 64
"""Positions whose logits over the whole vocabulary exist at a time: 64 MB of fp32 for 256,000 tokens."""


@dataclass(frozen=True)
class Lens:
    """Statistics of the distribution p_l over the next token, for each layer and position; on the CPU."""

    layers: tuple[int, ...]
    """Which block each row of the first axis is after."""
    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]
    """1 for tokens, 0 for padding; what stands at padding means nothing."""
    targets: Int[Tensor, "batch seq"]
    """The token asked about at each position; -100 where none is."""
    top_ids: Int[Tensor, "layers batch seq top"]
    """The most probable tokens, most probable first."""
    top_probabilities: Float[Tensor, "layers batch seq top"]
    entropy: Float[Tensor, "layers batch seq"]
    """Of p_l, in nats."""
    kl: Float[Tensor, "layers batch seq"]
    """KL(p_final || p_l) in nats; 0 for the last layer."""
    target_log_probability: Float[Tensor, "layers batch seq"]
    """log p_l of the target, in nats; NaN without one."""
    target_rank: Int[Tensor, "layers batch seq"]
    """1 for the most probable token; 0 without a target."""

    @property
    def target_probability(self) -> Float[Tensor, "layers batch seq"]:
        """p_l of the target; NaN without one."""
        return self.target_log_probability.exp()

    def to_frame(self, tokenizer: PreTrainedTokenizerBase | None = None) -> pl.DataFrame:
        """A row for each text, layer and position, padding left out; tokens as text too where a tokenizer is given."""
        shape = self.entropy.shape
        layer = torch.tensor(self.layers).view(-1, 1, 1).expand(shape)
        position = torch.arange(shape[2]).expand(shape)
        keep = self.attention_mask.bool().expand(shape).flatten()

        def column(values: Tensor) -> list:
            return values.expand(*shape, *values.shape[3:]).flatten(0, 2)[keep].tolist()

        frame = pl.DataFrame(
            {
                "text": column(torch.arange(shape[1]).unsqueeze(1)),
                "layer": column(layer),
                "position": column(position),
                "token_id": column(self.input_ids),
                "top_ids": column(self.top_ids),
                "top_probabilities": column(self.top_probabilities),
                "entropy": column(self.entropy),
                "kl": column(self.kl),
                "target_id": column(self.targets),
                "target_rank": column(self.target_rank),
                "target_log_probability": column(self.target_log_probability),
            }
        )
        asked = pl.col("target_id") != NO_TARGET
        frame = frame.with_columns(pl.when(asked).then(pl.col(name)) for name in frame.columns if "target" in name)
        if tokenizer is None:
            return frame
        ids = {*frame["token_id"], *frame["top_ids"].explode(), *frame["target_id"].drop_nulls()}
        text = {token: token_text(tokenizer, token) for token in ids}

        def spelled(name: str) -> pl.Expr:
            return pl.col(name).replace_strict(text, default=None, return_dtype=pl.String)

        top = pl.col("top_ids").list.eval(pl.element().replace_strict(text, return_dtype=pl.String))
        return frame.with_columns(
            spelled("token_id").alias("token"), top.alias("top_tokens"), spelled("target_id").alias("target")
        )


@dataclass(frozen=True)
class LensComparison:
    """The lens of one text in two views of a model."""

    clean: Lens
    steered: Lens
    kl: Float[Tensor, "layers batch seq"]
    """KL(steered || clean) of the same layer and position, in nats."""

    @property
    def target_change(self) -> Float[Tensor, "layers batch seq"]:
        """log p of the target, steered less clean, in nats; NaN without a target."""
        return self.steered.target_log_probability - self.clean.target_log_probability

    def to_frame(self, tokenizer: PreTrainedTokenizerBase | None = None) -> pl.DataFrame:
        """The clean lens's columns, the steered one's with the suffix `_steered`, `kl_steered_clean`, and
        `target_change`."""
        same = ["text", "layer", "position", "token_id", "target_id"] + (["token", "target"] if tokenizer else [])
        keep = self.clean.attention_mask.bool().expand(self.kl.shape)
        clean, steered = self.clean.to_frame(tokenizer), self.steered.to_frame(tokenizer).drop(same)
        change = pl.col("target_log_probability_steered") - pl.col("target_log_probability")
        return pl.concat([clean, steered.rename(lambda name: f"{name}_steered")], how="horizontal").with_columns(
            pl.Series("kl_steered_clean", self.kl[keep].tolist()), change.alias("target_change")
        )


def lens(
    view: TransformersModel,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Int[Tensor, "batch seq"] | None = None,
    *,
    layers: Sequence[int] | None = None,
    targets: Int[Tensor, "batch seq"] | None = None,
    top: int = 10,
) -> Lens:
    """The logit lens of a batch of texts, padded at the end, from one forward pass of a model or of a steered view.

    `layers`: which blocks, all by default. `targets`: the token whose rank and probability are asked for at each
    position (`next_tokens`, or one token everywhere), -100 for none. A block is read after what a view adds to it.
    Raises InputError for layers and tokens that the model does not have, and for a model whose logits are not its
    final norm and a `Head`.
    """
    (found,), _ = _read([view], input_ids, attention_mask, layers, targets, top)
    return found


def compare_lenses(
    clean: TransformersModel,
    steered: TransformersModel,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Int[Tensor, "batch seq"] | None = None,
    *,
    layers: Sequence[int] | None = None,
    targets: Int[Tensor, "batch seq"] | None = None,
    top: int = 10,
) -> LensComparison:
    """`lens` of two views, or of two models with one vocabulary, and how far they are apart; one forward pass each."""
    (one, other), kl = _read([steered, clean], input_ids, attention_mask, layers, targets, top)
    return LensComparison(clean=other, steered=one, kl=kl)


def next_tokens(
    input_ids: Int[Tensor, "batch seq"], attention_mask: Int[Tensor, "batch seq"] | None = None
) -> Int[Tensor, "batch seq"]:
    """Targets that ask at each position for the text's own next token; none at the last."""
    following = torch.nn.functional.pad(input_ids[:, 1:], (0, 1), value=NO_TARGET)
    if attention_mask is not None:
        following[:, :-1][attention_mask[:, 1:] == 0] = NO_TARGET
    return following


@torch.no_grad()
def _read(
    views: Sequence[TransformersModel],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    layers: Sequence[int] | None,
    targets: Tensor | None,
    top: int,
) -> tuple[list[Lens], Tensor]:
    """The lens of every view, and KL(first || last) of them."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    targets = torch.full_like(input_ids, NO_TARGET) if targets is None else targets.expand(input_ids.shape)
    depth = len(blocks_of(views[0]))
    layers = tuple(range(depth)) if layers is None else tuple(layers)
    check_sites(layers, depth)
    readouts = [Readout(view) for view in views]
    _check_tokens(readouts, targets, top)
    runs = [[h.flatten(0, 1) for h in readout.residuals(input_ids, mask)] for readout in readouts]

    def distributions(layer: int, rows: Tensor) -> list[Tensor]:
        """Log-probabilities [rows, vocabulary] in each view."""
        return [read(run[layer][rows]).log_softmax(dim=1) for read, run in zip(readouts, runs, strict=True)]

    # Of each view: chunk after chunk, and within it layer after layer.
    found: list[list[dict[str, Tensor]]] = [[] for _ in views]
    apart: list[Tensor] = []
    for rows in torch.arange(input_ids.numel()).split(AT_ONCE):
        finals = distributions(depth - 1, rows)
        for layer in layers:
            logps = distributions(layer, rows)
            for entries, logp, final in zip(found, logps, finals, strict=True):
                entries.append(_statistics(logp, final, targets.flatten()[rows], top))
            apart.append(_kl(logps[0], logps[-1].to(logps[0].device)).cpu())

    def whole(parts: list[Tensor]) -> Tensor:
        each = [torch.cat(parts[i :: len(layers)]) for i in range(len(layers))]
        return torch.stack(each).unflatten(1, input_ids.shape)

    text = (input_ids.cpu(), mask.cpu(), targets.cpu())
    lenses = [Lens(layers, *text, **{name: whole([e[name] for e in run]) for name in run[0]}) for run in found]
    return lenses, whole(apart)


def _statistics(logp: Tensor, final: Tensor, targets: Tensor, top: int) -> dict[str, Tensor]:
    """Fields of a Lens for one layer: [rows], or [rows, top]."""
    values, ids = logp.topk(top, dim=1)
    targets = targets.to(logp.device)
    none = targets == NO_TARGET
    wanted = logp.gather(1, targets.clamp(min=0).unsqueeze(1))
    found = {
        "top_ids": ids,
        "top_probabilities": values.exp(),
        "entropy": -(logp.exp() * logp).sum(dim=1),
        "kl": _kl(final, logp),
        "target_log_probability": wanted[:, 0].masked_fill(none, torch.nan),
        "target_rank": (1 + (logp > wanted).sum(dim=1)).masked_fill(none, 0),
    }
    return {name: values.cpu() for name, values in found.items()}


def _kl(p: Float[Tensor, "rows vocabulary"], q: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, " rows"]:
    """KL(p || q) of log-probabilities, never below zero by rounding."""
    return (p.exp() * (p - q)).sum(dim=1).clamp(min=0)


def _check_tokens(readouts: Sequence[Readout], targets: Tensor, top: int) -> None:
    sizes = {readout.vocabulary for readout in readouts}
    if len(sizes) > 1:
        raise InputError(f"Models with vocabularies of {min(sizes)} and {max(sizes)} tokens cannot be compared.")
    (size,) = sizes
    if not 1 <= top <= size:
        raise InputError(f"top must lie between 1 and the {size} tokens of the vocabulary, not {top}.")
    wrong = targets[(targets != NO_TARGET) & ((targets < 0) | (targets >= size))]
    if len(wrong):
        raise InputError(f"target {wrong[0]} is not a token of the model: 0 to {size - 1}, or {NO_TARGET} for none.")
