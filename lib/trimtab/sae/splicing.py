"""What the model itself loses when an SAE's reconstruction stands in for its residual stream.

At one site the residual stream x of every token is replaced by x_hat, and the blocks above run on. Two numbers come
out per token: cross-entropy of the next token, and KL(clean || spliced) between the two predictions. CE recovered is
(CE_zero - CE) / (CE_zero - CE_clean): 1 for the model as it is, 0 where the site is set to zero.

Positions that the SAE never saw are left as they are, in every condition alike: the first of each pass, and tokens
whose norm exceeds the cache's threshold. Predictions made at the first position are not counted, for nothing that
they see was replaced.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import polars as pl
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from torch import Tensor
from tqdm import tqdm

from trimtab.activations import ActivationCache
from trimtab.corpus import Batch, Blocks
from trimtab.errors import InputError
from trimtab.interventions import capture, device_of, resume
from trimtab.plots import COLOURS
from trimtab.sae.config import Arm
from trimtab.sae.evaluation import principal_components
from trimtab.sae.model import SAE, read_config
from trimtab.validation import ascending, at_least

if TYPE_CHECKING:
    from nnsight import TransformersModel

AT_ONCE = 16
"""Predictions compared at a time: with a vocabulary of tens of thousands they stay within the processor's caches,
which is several times faster than whole batches."""

LOSSES = {
    "condition": pl.String, "arm": pl.String, "k": pl.Int32, "document": pl.Int32,
    "tokens": pl.Int64, "ce": pl.Float64, "kl": pl.Float64,
}  # fmt: skip


@dataclass(frozen=True)
class SpliceConfig:
    """How much is read, and at which sparsities."""

    tokens: int = 4096
    """Budget of test tokens."""
    budgets: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Sparsities at which SAEs and PCA are spliced."""
    batch_blocks: int = 4
    """Blocks in one forward pass; logits of the whole vocabulary are held for each of their tokens."""

    def __post_init__(self) -> None:
        at_least(1, self, "tokens", "batch_blocks")
        ascending(self, "budgets")


class Condition(NamedTuple):
    """One way to replace residuals."""

    name: str
    """zero, mean, pca, or sae."""
    arm: str | None
    """Of an SAE."""
    k: int | None
    """Latents, or principal components."""
    replace: Callable[[Float[Tensor, "rows d_model"]], Float[Tensor, "rows d_model"]]
    """From raw residuals to what takes their place, in fp32."""


def read_saes(folder: Path, arms: Sequence[str], device: str = "cpu") -> tuple[dict[str, SAE], int]:
    """({arm: its SAE of the first seed}, the site that they read). Raises InputError for a missing arm, and where
    sites differ."""
    saes, sites = {}, set()
    for arm in arms:
        first = first_seed(folder / arm)
        saes[arm] = SAE.from_pretrained(first, device)
        sites.add(int(read_config(first)["metadata"]["site"]))
    if len(sites) != 1:
        raise InputError(f"{folder}: the SAEs of {', '.join(arms)} read sites {sorted(sites)}, not one.")
    return saes, sites.pop()


def first_seed(folder: Path) -> Path:
    """The folder of an arm's SAE of its first training seed. Raises InputError where there is none."""
    seeds = sorted(folder.glob("seed-*/"), key=lambda path: int(path.name.removeprefix("seed-")))
    if not seeds:
        raise InputError(f"{folder} holds no SAE: run `dvc repro sae@{folder.name}`.")
    return seeds[0]


def readings(arms: Sequence[str], budgets: Sequence[int]) -> list[tuple[str, int]]:
    """(arm, k) pairs: every arm at those of `budgets` that its objective has, and the largest TopK at all below its k
    too, where it was never trained to be read. Raises InputError for a name that is no arm."""
    parsed = [Arm.parse(arm) for arm in arms]
    truncated = max((arm.k for arm in parsed if arm.kind == "topk"), default=0)
    pairs = []
    for arm in parsed:
        own = arm.objective().budgets
        cut = arm == Arm("topk", truncated)
        pairs += [(str(arm), k) for k in sorted({*budgets, arm.k}) if k in own or (cut and k <= arm.k)]
    return pairs


def sae_conditions(saes: Mapping[str, SAE], budgets: Sequence[int]) -> list[Condition]:
    """The conditions of `readings`."""

    def reconstruct(sae: SAE, k: int, x: Tensor) -> Tensor:
        return sae.decode(sae.encode(x, k))

    return [Condition("sae", arm, k, partial(reconstruct, saes[arm], k)) for arm, k in readings(list(saes), budgets)]


def baselines(train: ActivationCache, budgets: Sequence[int], device: str = "cpu") -> list[Condition]:
    """Zero, the train mean, and the train mean plus the projection on the first k principal components."""
    directions, mean = principal_components(train).to(device), train.mean.to(device)

    def project(k: int, x: Tensor) -> Tensor:
        return mean + (x - mean) @ directions[:k].T @ directions[:k]

    zero = Condition("zero", None, None, torch.zeros_like)
    constant = Condition("mean", None, None, lambda x: mean.expand_as(x))
    return [zero, constant, *(Condition("pca", None, k, partial(project, k)) for k in budgets)]


@torch.inference_mode()
def splice_losses(
    wrapped: "TransformersModel",
    blocks: Blocks,
    cache: ActivationCache,
    conditions: Sequence[Condition],
    *,
    batch_blocks: int,
    pad: int,
    bos: int | None,
) -> pl.DataFrame:
    """Splice every condition into every block, at the cache's site; the clean model is the condition `clean`.

    Columns `condition`, `arm`, `k`, `document`, `tokens` (predictions counted), `ce` and `kl` (their sums, in nats).
    Log-probabilities are fp32.
    """
    clean_too = [Condition("clean", None, None, lambda x: x), *conditions]
    parts = []
    bar = tqdm(total=len(blocks) * len(clean_too), desc="splice", unit="block", mininterval=1)
    for batch in blocks.batches(0, len(blocks), batch_blocks, pad, bos):
        device = device_of(wrapped)
        ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        residual = capture(wrapped, ids, mask, [cache.site])[cache.site]
        replaced, rows = _replaced(residual, mask, cache.statistics.threshold), _counted(mask)
        clean = resume(wrapped, ids, mask, cache.site, residual)
        targets = ids.roll(-1, dims=1)[rows]
        clean_log_probs = clean[rows].log_softmax(dim=-1, dtype=torch.float32)
        for condition in clean_too:
            spliced = residual.clone()
            spliced[replaced] = condition.replace(residual[replaced].float()).to(residual.dtype)
            logits = resume(wrapped, ids, mask, cache.site, spliced) if condition.name != "clean" else clean
            losses = prediction_losses(logits[rows], clean_log_probs, targets)
            parts.append(_by_document(condition, batch, rows, *losses))
            bar.update(len(ids))
    bar.close()
    return (
        pl.concat(parts)
        .group_by("condition", "arm", "k", "document", maintain_order=True)
        .agg(pl.col("tokens", "ce", "kl").sum())
    )


def prediction_losses(
    logits: Float[Tensor, "rows vocabulary"],
    clean_log_probs: Float[Tensor, "rows vocabulary"],
    targets: Int[Tensor, " rows"],
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """(cross-entropy of the targets, KL(clean || these)), in nats."""
    ce, kl = [], []
    for start in range(0, len(logits), AT_ONCE):
        these = slice(start, start + AT_ONCE)
        log_probs = logits[these].log_softmax(dim=-1, dtype=torch.float32)
        ce.append(F.nll_loss(log_probs, targets[these], reduction="none"))
        kl.append(F.kl_div(log_probs, clean_log_probs[these], reduction="none", log_target=True).sum(dim=1))
    return torch.cat(ce), torch.cat(kl)


def recovered(losses: pl.DataFrame) -> pl.DataFrame:
    """One row per condition, over all documents: `ce` and `kl` per token, and CE recovered against zero and against
    the train mean."""
    table = (
        losses.group_by("condition", "arm", "k", maintain_order=True)
        .agg(pl.col("tokens", "ce", "kl").sum())
        .with_columns(pl.col("ce", "kl") / pl.col("tokens"))
    )
    ce = {name: table.filter(pl.col("condition") == name)["ce"].item() for name in ("clean", "zero", "mean")}
    return table.with_columns(
        ((ce[name] - pl.col("ce")) / (ce[name] - ce["clean"])).alias(f"recovered_{name}") for name in ("zero", "mean")
    )


def plot_over_k(axis: Axes, table: pl.DataFrame, column: str, arms: Sequence[str]) -> None:
    """One column of `recovered` over k: a line for each arm read at several k and for PCA, a point for other arms, a
    dotted line for the train mean."""
    first = sorted(arms, key=lambda arm: Arm.parse(arm).kind != "hierarchical")
    for i, name in enumerate([*first, "pca"]):
        rows = table.filter(pl.coalesce("arm", "condition") == name).sort("k")
        colour = COLOURS[6] if name == "pca" else COLOURS[i % 6]
        line = axis.plot(rows["k"], rows[column], color=colour, label=name, linewidth=2.2 if i == 0 else 1.2)[0]
        line.set(linestyle="--" if name == "pca" else "-", marker="os^D"[i // 6 % 4], markersize=5)
    level = table.filter(pl.col("condition") == "mean")[column].item()
    axis.axhline(level, color=COLOURS[7], linestyle=":", label="mean")
    ticks = table["k"].drop_nulls().unique().sort().to_list()
    axis.set(xlabel="k, latents or components per token", xscale="log")
    axis.set_xticks(ticks, [str(k) for k in ticks])
    axis.minorticks_off()


def _replaced(
    residual: Float[Tensor, "batch seq d_model"], mask: Int[Tensor, "batch seq"], threshold: float
) -> Bool[Tensor, "batch seq"]:
    keep = mask.bool() & (residual.float().norm(dim=-1) <= threshold)
    keep[:, 0] = False
    return keep


def _counted(mask: Int[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """Positions after the first that have a next token."""
    counted = mask.bool() & mask.roll(-1, dims=1).bool()
    counted[:, 0], counted[:, -1] = False, False
    return counted


def _by_document(
    condition: Condition,
    batch: Batch,
    rows: Bool[Tensor, "batch seq"],
    ce: Float[Tensor, " rows"],
    kl: Float[Tensor, " rows"],
) -> pl.DataFrame:
    n = len(ce)
    documents = batch.document[:, None].expand(rows.shape)[rows.cpu()]
    columns = {
        "condition": [condition.name] * n, "arm": [condition.arm] * n, "k": [condition.k] * n,
        "document": documents.numpy(), "tokens": [1] * n,
        "ce": ce.double().cpu().numpy(), "kl": kl.double().cpu().numpy(),
    }  # fmt: skip
    return pl.DataFrame(columns, schema=LOSSES)
