"""Reading steering vectors: the tokens they promote, their geometry across layers and seeds, what they are made of.

A vector is added after its block, so what it does to the logits passes through every block above. All readouts here
are of the direct path alone: as if the vector were added to the residual stream after the *last* block.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trimtab.errors import InputError
from trimtab.interventions import Readout, direct_logits

if TYPE_CHECKING:
    from nnsight import TransformersModel

Reading = Literal["raw", "cosine", "norm", "difference"]
CHUNK = 16384
"""Rows of the unembedding that are brought to fp32 at a time."""
EXHAUSTED = 1e-6
"""A residual of less than this share of the vector's norm is rounding."""


@torch.no_grad()
def vector_logits(
    wrapped: "TransformersModel",
    vectors: Float[Tensor, "n d_model"],
    reading: Reading,
    residuals: Float[Tensor, "rows d_model"] | None = None,
) -> Float[Tensor, "n vocabulary"]:
    """What each vector adds to the logits on the direct path; fp32, centred over the vocabulary, before any cap. Of
    every reading the order means something, of `difference` alone the size.

    - `raw`: W_U v, as in Bias-Only Adaptation's code; blind to the final norm. Long rows of W_U win: rare tokens.
    - `cosine`: of v and each row of W_U, its code's other reading, in which a row's own token always comes first.
    - `norm`: W_U (g * v), g the final norm's gain (`interventions.direct_logits`); blind to its division by the length.
    - `difference`: the mean of lm_head(norm(h + v)) - lm_head(norm(h)) over `residuals` h. They must be of the **last**
      block, whatever the vector's own layer, for only there does the final norm follow: `capture` at the last site,
      of the clean model.

    Raises InputError for `difference` without residuals, and for residuals with another reading.
    """
    if (reading == "difference") != (residuals is not None):
        raise InputError("The reading `difference` needs residuals of the last block; the others take none.")
    if reading == "norm":
        return direct_logits(wrapped, vectors)
    readout = Readout(wrapped)
    unembedding = readout.unembedding.weight
    moved = vectors.to(unembedding.device).float()
    if residuals is not None:
        moved = _through_norm(readout.norm, moved, residuals.to(unembedding.device).float())
    chunks = (rows.float() for rows in unembedding.split(CHUNK))
    if reading == "cosine":
        moved, chunks = F.normalize(moved, dim=1), (F.normalize(rows, dim=1) for rows in chunks)
    logits = torch.cat([moved @ rows.T for rows in chunks], dim=1)
    return logits - logits.mean(dim=1, keepdim=True)


def _through_norm(
    norm: torch.nn.Module, vectors: Float[Tensor, "n d_model"], residuals: Float[Tensor, "rows d_model"]
) -> Float[Tensor, "n d_model"]:
    """The mean of norm(h + v) - norm(h). The unembedding is linear, so that it can follow the mean."""
    weights = {name: weight.float() for name, weight in norm.named_parameters()}

    def mean(h: Tensor) -> Tensor:
        return torch.func.functional_call(norm, weights, h).mean(dim=0)

    return torch.stack([mean(residuals + vector) for vector in vectors]) - mean(residuals)


def real_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Bool[Tensor, " vocabulary"]:
    """Which rows of the unembedding are tokens of a text: not special ones, and not padding of the matrix."""
    allowed = torch.zeros(vocabulary, dtype=torch.bool)
    allowed[: len(tokenizer)] = True
    special = [token for token, kind in tokenizer.added_tokens_decoder.items() if kind.special]
    allowed[special + tokenizer.all_special_ids] = False
    return allowed


class Extremes(NamedTuple):
    """The tokens that each vector moves most, the most moved first."""

    promoted: Int[Tensor, "n top"]
    promoted_logits: Float[Tensor, "n top"]
    suppressed: Int[Tensor, "n top"]
    suppressed_logits: Float[Tensor, "n top"]


def extremes(
    logits: Float[Tensor, "n vocabulary"], top: int, allowed: Bool[Tensor, " vocabulary"] | None = None
) -> Extremes:
    """The largest and the smallest `top` of `vector_logits`, among `allowed` tokens (`real_tokens`)."""
    left_out = torch.zeros_like(logits[0], dtype=torch.bool) if allowed is None else ~allowed.to(logits.device)
    most = logits.masked_fill(left_out, -torch.inf).topk(top, dim=1)
    least = logits.masked_fill(left_out, torch.inf).topk(top, dim=1, largest=False)
    return Extremes(most.indices, most.values, least.indices, least.values)


def task_auroc(
    logits: Float[Tensor, "n vocabulary"],
    task: Int[Tensor, " task"],
    allowed: Bool[Tensor, " vocabulary"] | None = None,
) -> Float[Tensor, " n"]:
    """The chance that a token of the task is promoted above another token, ties counting half: the mean normalised
    rank of the task's tokens, 0.5 for a vector that knows nothing of the task.

    Token frequency alone moves it, so compare with `random_like`. Raises InputError where either side is empty.
    """
    inside = torch.zeros(logits.shape[1], dtype=torch.bool)
    inside[task.cpu()] = True
    allowed = torch.ones_like(inside) if allowed is None else allowed.cpu()
    if not bool((inside & allowed).any()) or not bool((~inside & allowed).any()):
        raise InputError("An AUROC needs at least one token of the task and one other among those allowed.")
    own = logits[:, (inside & allowed).to(logits.device)].contiguous()
    others = logits[:, (~inside & allowed).to(logits.device)].sort(dim=1).values
    below, not_above = (torch.searchsorted(others, own, right=right).double() for right in (False, True))
    return ((below + not_above) / (2 * others.shape[1])).mean(dim=1).float()


def coherence(unembedding: Float[Tensor, "vocabulary d_model"], ids: Int[Tensor, "n top"]) -> Float[Tensor, " n"]:
    """Mean cosine between the unembedding rows of two different tokens of each row of `ids`.

    The promoted tokens of any direction share that direction, so compare with `random_like`. All rows of an
    unembedding share a direction, too: less their mean (`W_U - W_U.mean(0)`) the control is lower and much narrower.
    Raises InputError for fewer than two tokens.
    """
    top = ids.shape[1]
    if top < 2:
        raise InputError("Coherence is of pairs: give at least two tokens.")
    rows = F.normalize(unembedding[ids.to(unembedding.device)].detach().float(), dim=2)
    return (rows.sum(dim=1).square().sum(dim=1) - top) / (top * (top - 1))


def random_like(
    vectors: Float[Tensor, "*shape d_model"], generator: torch.Generator | None = None
) -> Float[Tensor, "*shape d_model"]:
    """Vectors of the same norms in random directions, drawn on the CPU: the control for every reading."""
    drawn = torch.randn(vectors.shape, generator=generator).to(vectors.device)
    return F.normalize(drawn, dim=-1) * norms(vectors).unsqueeze(-1)


def norms(vectors: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape"]:
    """Lengths, to be read beside the residual stream's own at each layer."""
    return vectors.detach().float().norm(dim=-1)


def cosines(vectors: Float[Tensor, "*more n d_model"]) -> Float[Tensor, "*more n n"]:
    """Cosine of every pair; 0 with a vector that is zero. Of [layers, d_model] between layers; of [layers, seeds,
    d_model] the agreement between seeds, layer by layer."""
    unit = F.normalize(vectors.detach().float(), dim=-1)
    return unit @ unit.mT


def singular_values(vectors: Float[Tensor, "layers d_model"]) -> Float[Tensor, " rank"]:
    """Of the matrix of all vectors, largest first."""
    return torch.linalg.svdvals(vectors.detach().float())


def stable_rank(vectors: Float[Tensor, "layers d_model"]) -> float:
    """|S|_F^2 / |S|_2^2: 1 where all vectors are parallel, their number where they are orthogonal and equally long;
    NaN where all are zero."""
    squares = singular_values(vectors).double().square()
    return float(squares.sum() / squares[0])


def overlap(ids: Int[Tensor, "*more n top"]) -> Float[Tensor, "*more n n"]:
    """Share of the tokens of one list that another has too: of [layers, seeds, top] promoted tokens the agreement
    between seeds."""
    same = ids[..., :, None, :, None] == ids[..., None, :, None, :]
    return same.any(dim=-1).float().mean(dim=-1)


class Decomposition(NamedTuple):
    """A vector as a combination of few directions."""

    indices: Int[Tensor, " m"]
    """In the order in which they were chosen."""
    coefficients: Float[Tensor, " m"]
    """Of either sign, though an SAE's latents are never negative."""
    explained: float
    """1 - |v - v_hat|^2 / |v|^2."""
    reconstruction: Float[Tensor, " d_model"]


@torch.no_grad()
def decompose(
    vector: Float[Tensor, " d_model"], directions: Float[Tensor, "latents d_model"], budgets: Sequence[int]
) -> list[Decomposition]:
    """Orthogonal matching pursuit of a vector on unit directions, in fp64; one result for each number m of `budgets`.

    Each step adds the direction with the largest |cosine| to what is left, and all coefficients are refitted by least
    squares. Once nothing that any direction reaches is left, no more are chosen. Raises InputError for a zero vector
    and for budgets outside 1 to the number of directions.
    """
    wrong = [m for m in budgets if not 1 <= m <= len(directions)]
    if wrong or not budgets:
        raise InputError(f"A decomposition has between 1 and {len(directions)} directions, not {wrong or 'none'}.")
    target, matrix = vector.detach().double().cpu(), directions.detach().double().cpu()
    size = target.norm()
    if size == 0:
        raise InputError("A zero vector has no decomposition.")
    chosen: list[int] = []
    basis = target.new_empty(0, len(target))  # orthonormal, of the chosen directions
    rest = target.clone()
    while len(chosen) < max(budgets) and rest.norm() > EXHAUSTED * size:
        scores = (matrix @ rest).abs()
        scores[chosen] = -1
        best = int(scores.argmax())
        if scores[best] <= EXHAUSTED * size:  # what is left is orthogonal to all directions
            break
        fresh = matrix[best]
        for _ in range(2):  # once is not enough beside nearly parallel directions
            fresh = fresh - basis.T @ (basis @ fresh)
        chosen.append(best)
        basis = torch.cat([basis, F.normalize(fresh, dim=0)[None]])
        rest = rest - basis.T @ (basis @ rest)
    found = []
    for m in budgets:
        ids = torch.tensor(chosen[:m], dtype=torch.long)
        weights = torch.linalg.lstsq(matrix[ids].T, target).solution
        made = weights @ matrix[ids]
        explained = 1 - float(((target - made).norm() / size) ** 2)
        found.append(Decomposition(ids, weights.float(), explained, made.float()))
    return found
