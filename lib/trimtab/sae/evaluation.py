"""How well an SAE reconstructs held-out rows at every budget, and how its dictionary is used."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from trimtab.activations import ActivationCache
from trimtab.sae.model import SAE, Latents, weighted_rows
from trimtab.sae.objectives import prefix_loss

DENSE = 0.1
"""A latent that fires on more than this share of rows is dense."""


@dataclass(frozen=True)
class SquaredErrors:
    """Sums over held-out rows, kept by document so that intervals can resample documents.

    FVU(k) = sum ||x - x_hat_k||^2 / sum ||x||^2 in normalised space: x has the train mean removed, so that predicting
    that mean scores exactly 1. Outlier rows are left out, except in the columns that begin with `all_`.
    """

    table: pl.DataFrame
    """Columns: `k`, `document`, `rows`, `error` (sum of squares), `total` (sum of squares of x), `cosine` (sum over
    rows of cos(x, x_hat)), `active` (sum of latents above zero), `all_error` and `all_total` (outliers included)."""
    density: dict[int, Float[Tensor, " latents"]]
    """For each k, the share of rows on which each latent is active."""

    def fvu(self, *, outliers: bool = False) -> dict[int, float]:
        """FVU by k over all documents."""
        mark = "all_" if outliers else ""
        return self._ratio(f"{mark}error", f"{mark}total")

    def cosine(self) -> dict[int, float]:
        """Mean cosine of x and its reconstruction by k."""
        return self._ratio("cosine", "rows")

    def l0(self) -> dict[int, float]:
        """Mean number of active latents by k: below k where fewer are positive."""
        return self._ratio("active", "rows")

    def alive(self) -> dict[int, float]:
        """For each k, the share of latents that are active on at least one held-out row."""
        return {k: float((density > 0).float().mean()) for k, density in self.density.items()}

    def dense(self) -> dict[int, float]:
        """For each k, the share of latents that are active on more than a tenth of the rows."""
        return {k: float((density > DENSE).float().mean()) for k, density in self.density.items()}

    def _ratio(self, over: str, under: str) -> dict[int, float]:
        sums = self.table.group_by("k").agg(pl.col(over).sum(), pl.col(under).sum()).sort("k")
        return {k: a / b for k, a, b in sums.iter_rows()}


@torch.inference_mode()
def squared_errors(
    sae: SAE, cache: ActivationCache, budgets: Sequence[int], *, shuffle_ranks: int | None = None
) -> SquaredErrors:
    """Read an SAE of normalised rows at each budget of `budgets` on every row of a cache, in fp32, encoding it once.

    With a seed in `shuffle_ranks` the active latents of a row are put in random order before prefixes are taken: the
    control that tells whether their ranking matters.
    """
    budgets = sorted(set(budgets))
    generator = None if shuffle_ranks is None else torch.Generator().manual_seed(shuffle_ranks)
    device = sae.W_dec.device
    sums: dict[int, Tensor] = {}
    fired = torch.zeros(len(budgets), sae.latents, dtype=torch.int64)
    rows = 0
    for chunk in tqdm(cache.read(outliers=True), desc="evaluate", unit="chunk", mininterval=1):
        x, kept = chunk["x"].to(device), chunk["kept"].to(device)
        latents = sae.encode(x, budgets[-1])
        if generator is not None:
            order = torch.rand(latents.values.shape, generator=generator).argsort(dim=1).to(device)
            latents = Latents(latents.values.gather(1, order), latents.indices.gather(1, order))
        columns = _columns(x, kept, latents, sae, budgets)
        documents, place = chunk["document"].unique(return_inverse=True)
        by_document = torch.zeros(len(documents), *columns.shape[1:], dtype=torch.float64)
        by_document.index_add_(0, place, columns.double().cpu())
        for document, values in zip(documents.tolist(), by_document, strict=True):
            sums[document] = sums.get(document, 0) + values
        for i, k in enumerate(budgets):
            code = latents.prefix(k)
            active = code.indices[(code.values > 0) & kept[:, None]]
            fired[i] += torch.bincount(active.flatten(), minlength=sae.latents).cpu()
        rows += int(kept.sum())
    names = ("rows", "total", "error", "cosine", "active", "all_total", "all_error")
    entries = [(k, d, *v[i].tolist()) for d, v in sorted(sums.items()) for i, k in enumerate(budgets)]
    schema = {"k": pl.Int32, "document": pl.Int32} | dict.fromkeys(names, pl.Float64)
    table = pl.DataFrame(entries, schema=schema, orient="row").with_columns(pl.col("rows", "active").cast(pl.Int64))
    return SquaredErrors(table, {k: fired[i] / rows for i, k in enumerate(budgets)})


@torch.no_grad()
def weighted_fvu(sae: SAE, cache: ActivationCache, budgets: Mapping[int, float]) -> float:
    """sum over k of budgets[k] FVU(k) over the sum of budgets: an objective's own loss on the rows of a cache.

    By the loss kernel, so that all of 1..K cost what one reading does.
    """
    error = total = 0.0
    for chunk in cache.read():
        x = chunk["x"].to(sae.W_dec.device)
        error += x.numel() * float(prefix_loss(x, sae.encode(x, max(budgets)), sae, budgets))
        total += float(x.square().sum())
    return error / total / sum(budgets.values())


def reconstructions(sae: SAE, latents: Latents, budgets: Sequence[int]) -> list[Float[Tensor, "batch d_model"]]:
    """x_hat_k at each of the ascending budgets; a slice of ranks is decoded once and added to the last."""
    x_hat: Tensor = sae.b_dec
    done, out = 0, []
    for k in budgets:
        x_hat = x_hat + weighted_rows(Latents(latents.values[:, done:k], latents.indices[:, done:k]), sae.W_dec)
        out.append(x_hat)
        done = k
    return out


@torch.inference_mode()
def calibrate(sae: SAE, cache: ActivationCache, budgets: Sequence[int]) -> dict[int, float]:
    """For each budget k, the threshold above which k latents a row are active on average on the cache's rows.

    It is what makes an SAE usable one token at a time at any k, rows taking as many latents as they need (the inference
    of BatchTopK, Bussmann et al. 2024). `SAE.encode(x, threshold=...)` reads with it.
    """
    width, device = min(4 * max(budgets), sae.latents), sae.W_dec.device
    while True:
        values = torch.cat([_largest(sae, chunk["x"].to(device), width).cpu() for chunk in cache.read()])
        flat = values.flatten().sort(descending=True).values
        # Strictly above the next smaller one: exactly rows * k are, but for ties.
        found = {k: float(flat[min(len(values) * k, len(flat) - 1)]) for k in budgets}
        # A row whose last value is above a threshold may have more above it: look further.
        if width == sae.latents or not bool((values[:, -1] > min(found.values())).any()):
            return found
        width = min(2 * width, sae.latents)


def _largest(sae: SAE, x: Float[Tensor, "batch d_model"], width: int) -> Float[Tensor, "batch {width}"]:
    """The `width` largest activations of each row; zeros where fewer are active."""
    values = sae.encode(x, width).values
    return F.pad(values, (0, width - values.shape[1]))


@torch.inference_mode()
def principal_components(cache: ActivationCache) -> Float[Tensor, "d_model d_model"]:
    """Rows are the principal directions of the normalised rows, by falling variance: PCA with k is the first k."""
    covariance = torch.zeros(cache.d_model, cache.d_model, dtype=torch.float64)
    for chunk in cache.read():
        covariance += (chunk["x"].T @ chunk["x"]).double()
    return torch.linalg.eigh(covariance).eigenvectors.flip(1).T.float()


@torch.inference_mode()
def pca_fvu(
    components: Float[Tensor, "d_model d_model"], cache: ActivationCache, budgets: Sequence[int]
) -> dict[int, float]:
    """FVU of projecting the normalised rows of a cache on the first k components: a dense baseline with k numbers."""
    squares = torch.zeros(len(components), dtype=torch.float64)
    total = 0.0
    for chunk in cache.read():
        squares += (chunk["x"] @ components.T).square().sum(0).double()
        total += float(chunk["x"].double().square().sum())
    explained = squares.cumsum(0)
    return {k: 1 - float(explained[min(k, len(components)) - 1]) / total for k in budgets}


def _columns(
    x: Tensor, kept: Tensor, latents: Latents, sae: SAE, budgets: Sequence[int]
) -> Float[Tensor, "batch budgets 7"]:
    total = x.square().sum(dim=1)
    out = []
    for k, x_hat in zip(budgets, reconstructions(sae, latents, budgets), strict=True):
        error = (x - x_hat).square().sum(dim=1)
        norms = x_hat.square().sum(dim=1)
        cosine = (total + norms - error) / (2 * (total * norms).sqrt().clamp(min=1e-12))  # by the law of cosines
        active = (latents.values[:, :k] > 0).sum(dim=1)
        ordinary = torch.stack([torch.ones_like(total), total, error, cosine, active], dim=1)
        out.append(torch.cat([torch.where(kept[:, None], ordinary, 0), total[:, None], error[:, None]], dim=1))
    return torch.stack(out, dim=1)


@torch.inference_mode()
def threshold_reading(sae: SAE, cache: ActivationCache, budgets: Sequence[int]) -> dict[int, tuple[float, float]]:
    """{k: (mean L0, FVU)} on the rows of a cache, read at the thresholds stored with the SAE for these budgets."""
    sums = {k: torch.zeros(3, dtype=torch.float64) for k in budgets}
    for chunk in cache.read():
        x = chunk["x"].to(sae.W_dec.device)
        for k in budgets:
            latents = sae.encode(x, threshold=sae.thresholds[k])
            error = (x - sae.decode(latents)).square().sum()
            sums[k] += torch.stack([(latents.values > 0).sum(), error, x.square().sum()]).double().cpu()
    return {k: (float(total[0]) / cache.rows, float(total[1] / total[2])) for k, total in sums.items()}
