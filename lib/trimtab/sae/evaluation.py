"""How well an SAE reconstructs held-out rows at every budget, and how much of its dictionary is alive."""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from trimtab.activations import ActivationCache
from trimtab.sae.model import SAE, Latents, weighted_rows


@dataclass(frozen=True)
class SquaredErrors:
    """Sums over held-out rows, kept by document so that intervals can resample documents.

    FVU(k) = sum ||x - x_hat_k||^2 / sum ||x||^2 in normalised space: x has the train mean removed, so that predicting
    that mean scores exactly 1.
    """

    table: pl.DataFrame
    """Columns: `k`, `document`, `rows`, `error` (sum of squares), `total` (sum of squares of x)."""
    alive: dict[int, float]
    """For each k, the share of latents that are active on at least one held-out row."""

    def fvu(self) -> dict[int, float]:
        """FVU by k over all documents."""
        sums = self.table.group_by("k").agg(pl.col("error").sum(), pl.col("total").sum()).sort("k")
        return {k: error / total for k, error, total in sums.iter_rows()}


@torch.inference_mode()
def squared_errors(
    sae: SAE, cache: ActivationCache, budgets: Sequence[int], *, shuffle_ranks: int | None = None
) -> SquaredErrors:
    """Read the SAE at each budget of `budgets` on every row of a cache, in fp32, encoding each row once.

    With a seed in `shuffle_ranks` the active latents of a row are put in random order before prefixes are taken: the
    control that tells whether their ranking matters.
    """
    budgets = sorted(set(budgets))
    generator = None if shuffle_ranks is None else torch.Generator().manual_seed(shuffle_ranks)
    device = sae.W_dec.device
    errors: dict[int, Tensor] = {}
    fired = torch.zeros(len(budgets), sae.latents, dtype=torch.bool, device=device)
    for chunk in tqdm(cache.read(), desc="evaluate", unit="chunk", mininterval=1):
        x = chunk["x"].to(device)
        latents = sae.encode(x, budgets[-1])
        if generator is not None:
            order = torch.rand(latents.values.shape, generator=generator).argsort(dim=1).to(device)
            latents = Latents(latents.values.gather(1, order), latents.indices.gather(1, order))
        by_row = prefix_errors(x, latents, sae, budgets)
        columns = torch.cat([torch.ones(len(x), 1, device=device), x.square().sum(1, keepdim=True), by_row], dim=1)
        documents, place = chunk["document"].unique(return_inverse=True)
        sums = torch.zeros(len(documents), columns.shape[1], dtype=torch.float64)
        sums.index_add_(0, place, columns.double().cpu())
        for document, row in zip(documents.tolist(), sums, strict=True):
            errors[document] = errors.get(document, 0) + row
        for i, k in enumerate(budgets):
            active = latents.indices[:, :k][latents.values[:, :k] > 0]
            fired[i, active] = True
    rows = [
        (k, document, int(row[0]), float(row[2 + i]), float(row[1]))
        for document, row in sorted(errors.items())
        for i, k in enumerate(budgets)
    ]
    schema = {"k": pl.Int32, "document": pl.Int32, "rows": pl.Int64, "error": pl.Float64, "total": pl.Float64}
    alive = {k: int(fired[i].sum()) / sae.latents for i, k in enumerate(budgets)}
    return SquaredErrors(pl.DataFrame(rows, schema=schema, orient="row"), alive)


def prefix_errors(
    x: Float[Tensor, "batch d_model"], latents: Latents, sae: SAE, budgets: Sequence[int]
) -> Float[Tensor, "batch budgets"]:
    """||x - x_hat_k||^2 of each row at each ascending budget; a rank slice is decoded once and added to the last."""
    residual = x - sae.b_dec
    columns, done = [], 0
    for k in budgets:
        slice_ = Latents(latents.values[:, done:k], latents.indices[:, done:k])
        residual = residual - weighted_rows(slice_, sae.W_dec)
        columns.append(residual.square().sum(dim=1))
        done = k
    return torch.stack(columns, dim=1)
