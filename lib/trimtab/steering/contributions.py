"""What each layer, and each SAE latent, contributes to the gain of steering vectors: measured by leaving out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from trimtab.rl.policy import Policy
from trimtab.steering.analysis import decompose
from trimtab.steering.comparison import BASE, Correct
from trimtab.steering.experiment import Bench, Questions
from trimtab.steering.vectors import SteeringVectors

if TYPE_CHECKING:
    from nnsight import TransformersModel

LATENTS, RANDOM = "SAE latents", "random directions"
VECTOR = "vector"


def by_layer(
    bench: Bench, wrapped: "TransformersModel", vectors: SteeringVectors, questions: Questions, step: int = 1
) -> pl.DataFrame:
    """Greedy accuracy with one layer's vector alone, and with all but that one, for each of the layers, or for each
    `step`-th: columns `layer`, `alone`, `without`."""
    whole = vectors.vectors().detach()
    rows = []
    for i, layer in tqdm(list(enumerate(vectors.layers))[::step], desc="layers", mininterval=1):
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
    right: Correct
    """Of the untrained model, of the `VECTOR` itself, and of what was `rebuilt` from m directions."""


def rebuilt(directions: str, m: int) -> str:
    """What the vector rebuilt from m of these directions is called in `Kept.right`."""
    return f"{m} {directions}"


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
    arms = {BASE: np.array([bench.right(Policy(wrapped, {}), questions)])}
    arms[VECTOR] = np.array(
        [right(bench, wrapped, v.layers, v.vectors().detach(), questions) for v in vectors.values()]
    )
    parts = {(name, s): decompose(v.vectors()[0], d, budgets)
             for s, v in vectors.items() for name, d in ((LATENTS, directions), (RANDOM, random))}  # fmt: skip
    rows = []
    for name in (LATENTS, RANDOM):
        for i, m in enumerate(budgets):
            arrays = [
                right(bench, wrapped, made.layers, parts[name, s][i].reconstruction[None], questions)
                for s, made in vectors.items()
            ]
            arms[rebuilt(name, m)] = np.array(arrays)
            explained = float(np.mean([parts[name, s][i].explained for s in vectors]))
            rows.append((name, m, float(np.mean(arrays)), explained))
    table = pl.DataFrame(rows, schema=["directions", "m", "accuracy", "explained"], orient="row")
    return Kept(table, Correct.read(arms, [item.subject for item in questions.items]))


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
