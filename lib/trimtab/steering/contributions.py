"""What each layer, and each SAE latent, contributes to the gain of steering vectors: measured by leaving out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from trimtab.rl.policy import Policy
from trimtab.steering.analysis import decompose
from trimtab.steering.experiment import Bench, Questions
from trimtab.steering.vectors import SteeringVectors

if TYPE_CHECKING:
    from nnsight import TransformersModel

LATENTS, RANDOM = "SAE latents", "random directions"


def by_layer(
    bench: Bench, wrapped: "TransformersModel", vectors: SteeringVectors, questions: Questions
) -> pl.DataFrame:
    """Greedy accuracy with one layer's vector alone, and with all but that one: columns `layer`, `alone`, `without`."""
    whole = vectors.vectors().detach()
    rows = []
    for i, layer in enumerate(tqdm(vectors.layers, desc="layers", mininterval=1)):
        here = torch.zeros(len(whole), 1, device=whole.device)
        here[i] = 1
        alone, without = (
            accuracy(bench, wrapped, vectors.layers, factor * whole, questions) for factor in (here, 1 - here)
        )
        rows.append((layer, alone, without))
    return pl.DataFrame(rows, schema={"layer": pl.Int32, "alone": pl.Float64, "without": pl.Float64}, orient="row")


@dataclass(frozen=True)
class Kept:
    """Accuracy with a vector rebuilt from few directions."""

    table: pl.DataFrame
    """Columns `directions` (SAE latents or random ones), `m`, `accuracy` and `explained`, means over seeds."""
    base: Float[np.ndarray, " items"]
    """Right answers of the untrained model."""
    whole: Float[np.ndarray, "seeds items"]
    """Of the vector itself."""
    rebuilt: Mapping[tuple[str, int], Float[np.ndarray, "seeds items"]]
    """By directions and m."""
    subject: Int[np.ndarray, " items"]
    """Which subject each item asks about, as a number."""

    @property
    def seeds(self) -> int:
        """Training seeds."""
        return len(self.whole)

    @property
    def items(self) -> int:
        """Questions."""
        return len(self.base)

    @property
    def groups(self) -> int:
        """Subjects: items of one are near relatives."""
        return int(self.subject.max()) + 1

    def gain(self, right: Float[np.ndarray, " items"], weights: Float[np.ndarray, " groups"]) -> float:
        """Accuracy less that of the untrained model."""
        by_item = weights[self.subject]
        return float((right - self.base) @ by_item / by_item.sum())

    def whole_gain(self, seed: int, weights: Float[np.ndarray, " groups"]) -> float:
        """Of one seed's vector itself."""
        return self.gain(self.whole[seed], weights)

    def share(self, m: int, seed: int, weights: Float[np.ndarray, " groups"], directions: str = LATENTS) -> float:
        """One seed's term of the share of the gain that m latents (or random directions) keep: the ratio of the means
        over seeds, and to first order how this seed moves it; 0 where the vectors gained nothing."""
        kept = [self.gain(right, weights) for right in self.rebuilt[directions, m]]
        whole = [self.gain(right, weights) for right in self.whole]
        if not sum(whole):
            return 0.0
        ratio = sum(kept) / sum(whole)
        return ratio + (kept[seed] - ratio * whole[seed]) / float(np.mean(whole))

    def advantage(self, m: int, seed: int, weights: Float[np.ndarray, " groups"]) -> float:
        """How much more of the gain m latents keep than m random directions."""
        return self.share(m, seed, weights) - self.share(m, seed, weights, RANDOM)


def by_latents(
    bench: Bench,
    wrapped: "TransformersModel",
    vectors: Mapping[int, SteeringVectors],
    directions: Float[Tensor, "latents d_model"],
    budgets: Sequence[int],
    questions: Questions,
    *,
    seed: int,
) -> Kept:
    """Rebuild each seed's vector, of one layer, from m of `directions` (an SAE's decoder rows) by orthogonal matching
    pursuit, and from m of as many random unit directions; read each greedily in the vector's place."""
    generator = torch.Generator().manual_seed(seed)
    random = F.normalize(torch.randn(directions.shape, generator=generator), dim=1)
    base = np.array(bench.right(Policy(wrapped, {}), questions))
    rebuilt, rows = {}, []
    parts = {(name, s): decompose(v.vectors()[0], d, budgets)
             for s, v in vectors.items() for name, d in ((LATENTS, directions), (RANDOM, random))}  # fmt: skip
    whole = [right(bench, wrapped, v.layers, v.vectors().detach(), questions) for v in vectors.values()]
    for name in (LATENTS, RANDOM):
        for i, m in enumerate(budgets):
            arrays = [
                right(bench, wrapped, made.layers, parts[name, s][i].reconstruction[None], questions)
                for s, made in vectors.items()
            ]
            rebuilt[name, m] = np.array(arrays)
            explained = float(np.mean([parts[name, s][i].explained for s in vectors]))
            rows.append((name, m, float(np.mean(arrays)), explained))
    table = pl.DataFrame(rows, schema=["directions", "m", "accuracy", "explained"], orient="row")
    numbers = {subject: i for i, subject in enumerate(dict.fromkeys(item.subject for item in questions.items))}
    subjects = np.array([numbers[item.subject] for item in questions.items])
    return Kept(table, base, np.array(whole), rebuilt, subjects)


def right(
    bench: Bench,
    wrapped: "TransformersModel",
    layers: Sequence[int],
    vectors: Float[Tensor, "layers d_model"],
    questions: Questions,
) -> Float[np.ndarray, " items"]:
    """Whether each question is answered rightly with these vectors in the model, greedily."""
    made = SteeringVectors(layers, vectors.shape[1]).to(vectors.device)
    with torch.no_grad():
        made.weight.copy_(vectors)
    return np.array(bench.right(Policy(made.applied_to(wrapped), {}), questions))


def accuracy(
    bench: Bench,
    wrapped: "TransformersModel",
    layers: Sequence[int],
    vectors: Float[Tensor, "layers d_model"],
    questions: Questions,
) -> float:
    """The mean of `right`."""
    return float(right(bench, wrapped, layers, vectors, questions).mean())
