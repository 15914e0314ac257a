"""What `steering_lens` shows: vectors read as tokens, against random ones, and left out layer by layer."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import polars as pl
import torch
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trimtab.interventions import capture, device_of
from trimtab.plots import COLOURS
from trimtab.steering import analysis
from trimtab.steering.comparison import BASE
from trimtab.steering.contributions import LATENTS, RANDOM, VECTOR, Kept
from trimtab.steering.figures import shown

if TYPE_CHECKING:
    from nnsight import TransformersModel


class Against(NamedTuple):
    """Readings of several sets of vectors."""

    auroc: Float[Tensor, "sets layers"]
    """Of the task's tokens; `analysis.task_auroc`."""
    coherence: Float[Tensor, "sets layers"]
    """Of the most promoted tokens; `analysis.coherence`."""


def last_residuals(wrapped: "TransformersModel", prompts: Iterable[Sequence[int]]) -> Float[Tensor, "prompts d_model"]:
    """The clean residual after the last block at the last position of each prompt, in fp32."""
    site = wrapped._module.config.num_hidden_layers - 1
    rows = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=device_of(wrapped))
        rows.append(capture(wrapped, ids, torch.ones_like(ids), [site])[site][0, -1].float())
    return torch.stack(rows)


def task_tokens(tokenizer: PreTrainedTokenizerBase, characters: str) -> list[int]:
    """Ids of the tokens that are one of the characters, with a space before it or without."""
    found = {
        tuple(tokenizer(f"{space}{c}", add_special_tokens=False)["input_ids"])
        for c in characters
        for space in ("", " ")
    }
    return sorted(ids[0] for ids in found if len(ids) == 1)


def against(
    wrapped: "TransformersModel",
    sets: Float[Tensor, "sets layers d_model"],
    residuals: Float[Tensor, "rows d_model"],
    wanted: Int[Tensor, " task"],
    allowed: Bool[Tensor, " vocabulary"],
    top: int,
) -> Against:
    """Both readings of each set, in the difference lens."""
    rows = wrapped._module.get_output_embeddings().weight.detach().float()
    unembedding = rows - rows.mean(dim=0)  # all rows share a strong direction, which would make any tokens look alike
    auroc, coherence = [], []
    for vectors in sets:
        logits = analysis.vector_logits(wrapped, vectors, "difference", residuals)
        auroc.append(analysis.task_auroc(logits, wanted, allowed).cpu())
        coherence.append(analysis.coherence(unembedding, analysis.extremes(logits, top, allowed).promoted).cpu())
    return Against(torch.stack(auroc), torch.stack(coherence))


def random_sets(
    vectors: Float[Tensor, "seeds layers d_model"], draws: int, seed: int
) -> Float[Tensor, "draws layers d_model"]:
    """Random vectors with the norms of the seeds' vectors, in turn."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([analysis.random_like(vectors[i % len(vectors)], generator) for i in range(draws)])


def token_table(found: analysis.Extremes, tokenizer: PreTrainedTokenizerBase, layers: Sequence[int]) -> pl.DataFrame:
    """A row for each layer: the tokens that its vector promotes most and suppresses most, spaces made visible."""

    def spelled(ids: Tensor) -> list[str]:
        return [" ".join(shown(str(tokenizer.decode([token]))) for token in row) for row in ids.tolist()]

    return pl.DataFrame(
        {"layer": list(layers), "promoted": spelled(found.promoted), "suppressed": spelled(found.suppressed)}
    )


def agreements(agreement: Float[Tensor, "layers seeds seeds"]) -> list[float]:
    """Jackknife values, one a seed, of the mean cosine of two seeds' vectors: their mean is that mean, and their spread
    makes the interval, which pairs, sharing seeds, would make too narrow. Of fewer than three seeds one value alone."""
    seeds = agreement.shape[1]
    whole = agreement.mean(dim=0).double()
    pairs = (whole.sum() - whole.trace()) / max(1, seeds * (seeds - 1))
    if seeds < 3:
        return [float(pairs)]
    without = (whole.sum() - whole.trace() - 2 * (whole.sum(dim=1) - whole.diagonal())) / ((seeds - 1) * (seeds - 2))
    return (seeds * pairs - (seeds - 1) * without).tolist()


def plot_against(axis: Axes, mine: Tensor, random: Tensor, layers: Sequence[int], title: str) -> None:
    """A curve for each seed over layers, above the range of the random sets."""
    axis.fill_between(layers, random.min(0).values, random.max(0).values, color=COLOURS[6], alpha=0.4, label="random")
    for colour, row in zip(COLOURS, mine, strict=False):
        axis.plot(layers, row, "o-", color=colour, markersize=3, linewidth=1)
    axis.set(xlabel="after block", ylabel=title)
    axis.set_title("Seeds against random vectors")
    axis.legend(fontsize=8)


def plot_layers(axis: Axes, table: pl.DataFrame, base: float, whole: float) -> None:
    """Accuracy with one vector alone, and with all but one, over layers."""
    axis.plot(table["layer"], table["alone"], "o-", color=COLOURS[0], markersize=4, label="this layer alone")
    axis.plot(table["layer"], table["without"], "s-", color=COLOURS[1], markersize=4, label="all but this layer")
    axis.axhline(base, color=COLOURS[6], linestyle="--", label="untrained model")
    axis.axhline(whole, color="black", linestyle=":", label="all layers")
    axis.set(xlabel="block after which the vector is added", ylabel="greedy accuracy", ylim=(0, 1))
    axis.set_title("What each layer's vector does")
    axis.legend(fontsize=8, ncols=2)


def plot_latents(accuracy: Axes, explained: Axes, kept: Kept) -> None:
    """Accuracy kept, and share of the vector explained, over the number of directions."""
    for name, colour in ((LATENTS, COLOURS[0]), (RANDOM, COLOURS[6])):
        rows = kept.table.filter(pl.col("directions") == name).sort("m")
        accuracy.plot(rows["m"], rows["accuracy"], "o-", color=colour, markersize=4, label=name)
        explained.plot(rows["m"], rows["explained"], "o-", color=colour, markersize=4, label=name)
    accuracy.axhline(kept.right.accuracy(BASE), color=COLOURS[6], linestyle="--", label="untrained model")
    accuracy.axhline(kept.right.accuracy(VECTOR), color="black", linestyle=":", label="the vector itself")
    ticks = sorted(set(kept.table["m"]))
    for axis, label in ((accuracy, "greedy accuracy"), (explained, "share of the vector explained")):
        axis.set(xscale="log", xlabel="directions that the vector is rebuilt from", ylabel=label, ylim=(0, 1))
        axis.set_xticks(ticks, [str(m) for m in ticks])
        axis.minorticks_off()
    accuracy.set_title("Accuracy kept")
    explained.set_title("Vector explained")
    accuracy.legend(fontsize=8)


def latent_table(
    wrapped: "TransformersModel",
    tokenizer: PreTrainedTokenizerBase,
    vector: Float[Tensor, " d_model"],
    directions: Float[Tensor, "latents d_model"],
    m: int,
    allowed: Bool[Tensor, " vocabulary"],
) -> pl.DataFrame:
    """The m directions that matching pursuit takes first, with their coefficients and the tokens they promote."""
    (found,) = analysis.decompose(vector, directions, [m])
    logits = analysis.vector_logits(wrapped, directions[found.indices], "norm")
    tokens = token_table(analysis.extremes(logits, 8, allowed), tokenizer, found.indices.tolist())
    return tokens.rename({"layer": "latent"}).with_columns(
        pl.Series("coefficient", found.coefficients.tolist()), pl.Series("cosine", _cosines(vector, directions, found))
    )


def _cosines(vector: Tensor, directions: Tensor, found: analysis.Decomposition) -> list[float]:
    return (directions[found.indices].float() @ vector.detach().float() / vector.detach().float().norm()).tolist()
