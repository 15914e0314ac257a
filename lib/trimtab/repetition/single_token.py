"""What a model predicts next, token by token, given the text that a person wrote (teacher forcing).

At each place t >= 1 of a row there is the distribution given the tokens before t, the gold token that stands at t, and
the prediction, which is the likeliest token. Ties go to the lower token id, in predictions and in ranks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.errors import InputError

WINDOWS = (16, 32, 128, 512)
"""Previous gold tokens among which rep/l looks."""
PLACES = 16
"""Places whose distributions are read at one time: few enough for a core's cache, which is passed over many times."""
HEAD, GROWTH = 256, 16
"""Largest probabilities that are sorted of each place, and how many times more where these do not fill a nucleus."""

Logits = Callable[[Int[Tensor, " seq"]], Float[Tensor, "seq vocab"]]
"""Those at a place of a row predict the token after it."""


@dataclass(frozen=True)
class Truncation:
    """What a decoder leaves of a distribution, renormalised: the top_k likeliest tokens, or the fewest likeliest whose
    mass reaches top_p, or everything."""

    name: str
    top_k: int | None
    top_p: float | None
    epsilon: float
    """Added to every probability in eps-perplexity."""

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_p is not None:
            raise InputError(f"The truncation {self.name} has both top_k and top_p: give one.")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"The truncation {self.name} keeps {self.top_k} tokens: top_k must be at least 1.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"The truncation {self.name} has top_p {self.top_p}: it must lie in (0, 1].")
        if self.epsilon < 0:
            raise InputError(f"The truncation {self.name} has epsilon {self.epsilon}: it must be at least 0.")


TRUNCATIONS = (
    Truncation("k=1", 1, None, 2e-5),
    Truncation("k=10", 10, None, 8e-6),
    Truncation("p=0.9", None, 0.9, 2e-6),
    Truncation("p=1", None, None, 0.0),
)
"""Those of the published evaluation."""


@dataclass(frozen=True)
class Truncated:
    """Means over places of what a truncated distribution p of V tokens gives the gold token."""

    eps_ppl: float
    """exp of the mean of -log((p[gold] + eps) / (1 + eps V)) (Martins et al. 2020); infinite where gold is cut off and
    eps is 0."""
    js: float
    """Jensen-Shannon divergence of p and one-hot gold, nats: 0 where they agree, log 2 where gold is cut off."""
    sparsemax: float
    """1 - (||p||^2 / 2 - p[gold] + 1/2): 1 where p is one-hot gold, 0 where it is one-hot elsewhere."""
    zero_share: float
    """Share of places where gold is cut off."""


@dataclass(frozen=True)
class SingleToken:
    """The reading of some rows; shares and means are over all their places."""

    row_nats: tuple[float, ...]
    """-log p of the gold tokens of each row, summed."""
    row_tokens: tuple[int, ...]
    """Places of each row: its tokens but the first."""
    acc: float
    """Share of predictions that are gold."""
    hits_10: float
    """Share of gold tokens among the ten likeliest."""
    mean_rank: float
    """Of gold, 1 being the likeliest."""
    median_rank: float
    uniq: int
    """Distinct predictions."""
    human_uniq: int
    """Distinct gold tokens, at the same places."""
    rep: dict[int, float]
    """For each window l, the share of predictions that occur among the previous l gold tokens, or all where there are
    fewer (Welleck et al. 2020, section 6)."""
    wrep: dict[int, float]
    """The share of places with a prediction that does and is not gold: what of rep is no repetition of the writer's."""
    human_rep: dict[int, float]
    """rep with the gold token for the prediction."""
    truncated: dict[str, Truncated]
    """By the truncation's name."""

    @property
    def ppl(self) -> float:
        """exp of the mean -log p of gold, over all tokens."""
        return math.exp(sum(self.row_nats) / sum(self.row_tokens))

    @property
    def average_rep(self) -> tuple[float, float, float]:
        """(rep, wrep, human rep), each the mean over windows."""
        rep, wrep, human = (sum(found.values()) / len(found) for found in (self.rep, self.wrep, self.human_rep))
        return rep, wrep, human


@torch.no_grad()
def single_token(
    logits: Logits,
    rows: Sequence[Int[Tensor, " _"]] | Int[Tensor, "rows seq"],
    truncations: Sequence[Truncation] = TRUNCATIONS,
) -> SingleToken:
    """Read rows of gold tokens with a model; `logits` is called for one row after the other, so that memory holds those
    of one. Raises InputError where there is no row, for a row of fewer than two tokens, and for logits that are not of
    their row's length."""
    if not len(rows) or min(map(len, rows)) < 2:
        raise InputError("Nothing is predicted: give at least one row, each of at least 2 tokens.")
    read, predictions, distances = [], [], []
    for row in rows:
        at_row = logits(row)
        if len(at_row) != len(row):
            raise InputError(f"A row of {len(row)} tokens has logits of {len(at_row)} places.")
        row = row.to(at_row.device)
        parts = zip(at_row[:-1].split(PLACES), row[1:].split(PLACES), strict=True)
        found = [_read(part.float(), gold, truncations) for part, gold in parts]
        prediction = torch.cat([part.prediction for part in found])
        read.append(found)
        predictions.append(prediction.cpu())
        distances.append(torch.stack([_distance(tokens, row) for tokens in (prediction, row[1:])]).cpu())
    prediction, gold = torch.cat(predictions), torch.cat([row[1:].cpu() for row in rows])
    distance, human = torch.cat(distances, dim=1)
    wrong = prediction != gold
    places = [part for found in read for part in found]
    rank = torch.cat([part.rank for part in places]).double().cpu()
    return SingleToken(
        tuple(sum(float(part.nats.sum()) for part in found) for found in read),
        tuple(len(row) - 1 for row in rows),
        acc=1 - _mean(wrong),
        hits_10=_mean(rank <= 10),
        mean_rank=_mean(rank),
        median_rank=float(rank.quantile(0.5)),
        uniq=prediction.unique().numel(),
        human_uniq=gold.unique().numel(),
        rep={window: _mean(distance <= window) for window in WINDOWS},
        wrep={window: _mean((distance <= window) & wrong) for window in WINDOWS},
        human_rep={window: _mean(human <= window) for window in WINDOWS},
        truncated={
            cut.name: _scores(torch.cat([part.kept[i] for part in places], dim=1).cpu(), cut)
            for i, cut in enumerate(truncations)
        },
    )


@dataclass(frozen=True)
class _Places:
    """Some places of a row."""

    prediction: Int[Tensor, " places"]
    rank: Int[Tensor, " places"]
    nats: Float[Tensor, " places"]
    kept: list[Float[Tensor, "3 places"]]
    """For each truncation p[gold], ||p||^2 and V."""


def _read(logits: Float[Tensor, "places vocab"], gold: Int[Tensor, " places"], cuts: Sequence[Truncation]) -> _Places:
    vocab = logits.shape[1]
    at_gold = logits.gather(1, gold[:, None])
    ids = torch.arange(vocab, device=logits.device)
    # One pass for both: above gold, or level with it and of a lower id.
    rank = 1 + ((logits > at_gold) | ((logits == at_gold) & (ids < gold[:, None]))).sum(dim=1)
    peak, prediction = logits.max(dim=1, keepdim=True)  # the first of equals
    shares = (logits - peak).exp_()
    total = shares.sum(dim=1, dtype=torch.float64)
    nats = total.log() + (peak - at_gold)[:, 0].double()
    p_gold = nats.neg().exp()
    head = shares.topk(min(HEAD, vocab), dim=1).values
    kept = []
    for cut in cuts:
        if cut.top_k is None and cut.top_p in (None, 1.0):
            p, square = p_gold, torch.linalg.vector_norm(shares, dim=1).double().square() / total.square()
        else:
            mass, square, count = _kept(shares, total, head, cut)
            p, square = torch.where(rank <= count, p_gold / mass, 0).clamp(max=1), square / mass.square()
        kept.append(torch.stack([p, square, torch.full_like(p, vocab)]))
    return _Places(prediction[:, 0], rank, nats, kept)


def _kept(
    shares: Float[Tensor, "places vocab"],
    total: Float[Tensor, " places"],
    head: Float[Tensor, "places head"],
    cut: Truncation,
) -> Float[Tensor, "3 places"]:
    """Mass, sum of squares and number of the probabilities shares / total that a truncation keeps; `head` are the
    largest of the shares."""
    found = _totals(head.double() / total[:, None], cut)
    size, vocab = head.shape[1], shares.shape[1]
    while size < vocab and (full := (found[2] == size).nonzero()[:, 0]).numel():
        size = min(size * GROWTH, vocab)
        found[:, full] = _totals(shares[full].topk(size, dim=1).values.double() / total[full, None], cut)
    return found


def _totals(values: Float[Tensor, "places some"], cut: Truncation) -> Float[Tensor, "3 places"]:
    """`values`: probabilities, the largest first."""
    if cut.top_k is not None:
        keep = (torch.arange(values.shape[1], device=values.device) < cut.top_k).expand_as(values)
    else:
        keep = values.cumsum(dim=1) - values < (1.0 if cut.top_p is None else cut.top_p)
    values = torch.where(keep, values, 0)
    return torch.stack([values.sum(dim=1), values.square().sum(dim=1), keep.sum(dim=1).double()])


def _distance(token: Int[Tensor, " places"], row: Int[Tensor, " seq"]) -> Float[Tensor, " places"]:
    """How far before its place each token last stood in the row; infinite where it never did."""
    place = torch.arange(1, len(row), device=row.device)[:, None]
    earlier = torch.arange(len(row), device=row.device)
    stood = (token[:, None] == row) & (earlier < place)
    return torch.where(stood, place - earlier, torch.inf).amin(dim=1)


def _scores(kept: Float[Tensor, "3 places"], cut: Truncation) -> Truncated:
    p, square, vocab = kept
    eps_ppl = -((p + cut.epsilon) / (1 + cut.epsilon * vocab)).log().mean()
    # Between p and one-hot gold, with m their mean: KL(gold || m) = -log((1 + p[gold]) / 2), and in KL(p || m) every
    # token but gold adds p log 2.
    gold = -((1 + p) / 2).log()
    js = (gold + torch.special.xlogy(p, 2 * p / (1 + p)) + (1 - p) * math.log(2)) / 2
    sparsemax = 1 - (square / 2 - p + 0.5)
    return Truncated(float(eps_ppl.exp()), _mean(js), _mean(sparsemax), _mean(p == 0))


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
