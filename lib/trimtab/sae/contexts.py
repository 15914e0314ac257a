"""Where latents fire: every row of a cache encoded once, cut into windows of text, and indexed by latent."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor
from tqdm import tqdm

from trimtab.activations import ActivationCache
from trimtab.errors import InputError
from trimtab.sae.model import Latents


@runtime_checkable
class Dictionary(Protocol):
    """What reads the model's raw residual stream as a few latents a row: an `SAE`, or anything like it."""

    @property
    def latents(self) -> int:
        """Size of the dictionary."""
        ...

    def encode(self, x: Float[Tensor, "batch d_model"], k: int) -> Latents:
        """The k largest latents of each row, in descending order."""
        ...


@dataclass(frozen=True)
class Example:
    """One window of text with one latent's activations."""

    document: int
    positions: Int[np.ndarray, " tokens"]
    """Index of each token in its document; a gap is a row that the cache leaves out."""
    tokens: Int[np.ndarray, " tokens"]
    activations: Float[np.ndarray, " tokens"]
    """In the units of the residual stream; 0 where the latent is silent."""


class Active(NamedTuple):
    """The windows in which one latent fires, in order."""

    windows: Int[np.ndarray, " active"]
    peaks: Float[np.ndarray, " active"]
    """Its largest activation in each."""
    ranks: Int[np.ndarray, " active"]
    """Its best rank in each: the smallest k at which the window shows it."""


@dataclass(frozen=True)
class Contexts:
    """The rows of one cache in windows, and for each latent the rows in which it fires.

    Rows are in order of document and position. Windows are the stretches [i * window, (i + 1) * window) of a document's
    positions; one that has less than half of its rows in the cache is left out, with its rows.
    """

    k: int
    """Latents read per row."""
    window: int
    """Tokens in a whole window."""
    document: Int[np.ndarray, " rows"]
    position: Int[np.ndarray, " rows"]
    token: Int[np.ndarray, " rows"]
    starts: Int[np.ndarray, " window_bounds"]
    """Window w holds rows starts[w] to starts[w + 1]."""
    pointers: Int[np.ndarray, " latent_bounds"]
    """Latent i has firings pointers[i] to pointers[i + 1] of the three arrays below, in order of rows."""
    rows: Int[np.ndarray, " firings"]
    values: Float[np.ndarray, " firings"]
    ranks: Int[np.ndarray, " firings"]
    """Place in the descending order of the row's activations, from 1."""

    @classmethod
    @torch.inference_mode()
    def collect(
        cls, dictionary: Dictionary, cache: ActivationCache, k: int, *, window: int = 32, device: str = "cpu"
    ) -> "Contexts":
        """Read a dictionary of raw residuals at k latents a row on all of a cache. Raises InputError for no window."""
        chunks: dict[str, list[np.ndarray]] = {}
        for chunk in tqdm(cache.read(raw=True), desc="contexts", unit="chunk", mininterval=1):
            values, indices = dictionary.encode(chunk["x"].to(device), k)
            arrays = {
                **{name: chunk[name] for name in ("document", "position", "token")},
                "values": values.float(),
                "indices": indices.to(torch.int32),
            }
            for name, tensor in arrays.items():
                chunks.setdefault(name, []).append(tensor.cpu().numpy())
        columns = {name: np.concatenate(parts) for name, parts in chunks.items()}
        order, starts = _windows(columns["document"], columns["position"], window)
        if not len(order):
            raise InputError(f"{cache.folder} holds no window of {window} tokens, not even half of one.")
        columns = {name: column[order] for name, column in columns.items()}
        row, place = np.nonzero(columns["values"] > 0)
        firings = (row.astype(np.int32), columns["values"][row, place], (place + 1).astype(np.int32))
        index = _by_latent(columns["indices"][row, place], *firings, rows=len(order), latents=dictionary.latents)
        return cls(k, window, columns["document"], columns["position"], columns["token"], starts, *index)

    @property
    def latents(self) -> int:
        """Size of the dictionary."""
        return len(self.pointers) - 1

    @property
    def windows(self) -> int:
        """Number of windows."""
        return len(self.starts) - 1

    def density(self) -> Float[np.ndarray, " latents"]:
        """Share of rows in which each latent fires."""
        return np.diff(self.pointers) / len(self.token)

    def median_rank(self) -> Float[np.ndarray, " latents"]:
        """Median, over a latent's firings, of its rank in the row (the lower one of two); NaN where it never fires."""
        ranks = (self.ranks - 1).astype(np.int64)
        cells = np.repeat(np.arange(self.latents), np.diff(self.pointers)) * self.k + ranks
        counts = np.bincount(cells, minlength=self.latents * self.k).reshape(self.latents, self.k)
        middle = (counts.cumsum(axis=1) >= (counts.sum(axis=1, keepdims=True) + 1) // 2).argmax(axis=1) + 1.0
        return np.where(np.diff(self.pointers) > 0, middle, np.nan)

    def active(self, latent: int) -> Active:
        """The windows in which a latent fires, with its largest activation and best rank in each."""
        mine = slice(*self.pointers[latent : latent + 2])
        windows, first = np.unique(np.searchsorted(self.starts, self.rows[mine], side="right") - 1, return_index=True)
        values, ranks = self.values[mine], self.ranks[mine]
        if not len(first):
            return Active(windows, values, ranks)
        return Active(windows, np.maximum.reduceat(values, first), np.minimum.reduceat(ranks, first))

    def example(self, latent: int, window: int) -> Example:
        """One window with a latent's activations in it."""
        start, stop = self.starts[window : window + 2]
        low, high = self.pointers[latent : latent + 2]
        first, last = low + np.searchsorted(self.rows[low:high], [start, stop])
        activations = np.zeros(stop - start, np.float32)
        activations[self.rows[first:last] - start] = self.values[first:last]
        return Example(int(self.document[start]), self.position[start:stop], self.token[start:stop], activations)

    def top(self, latent: int, n: int) -> list[Example]:
        """The n windows with a latent's largest activations, largest first; fewer where it fires in fewer."""
        active = self.active(latent)
        order = np.argsort(-active.peaks, kind="stable")[:n]
        return [self.example(latent, window) for window in active.windows[order].tolist()]

    def quantiles(
        self, latent: int, n: int, generator: np.random.Generator, *, ranks: tuple[int, int] | None = None
    ) -> list[Example]:
        """Windows drawn evenly over a latent's activations, strongest first.

        The windows in which it fires (with `ranks`: with a best rank from the first to the last of these) are put in
        order of its largest activation and cut into n parts of equal number; one is drawn of each. Fewer than n windows
        are all given.
        """
        active = self.active(latent)
        first, last = ranks or (1, self.k)
        eligible = np.flatnonzero((active.ranks >= first) & (active.ranks <= last))
        order = active.windows[eligible[np.argsort(-active.peaks[eligible], kind="stable")]]
        return [self.example(latent, int(generator.choice(part))) for part in np.array_split(order, n) if len(part)]

    def silent(self, latent: int, n: int, generator: np.random.Generator) -> list[Example]:
        """n random windows in which a latent does not fire; fewer where there are fewer."""
        windows = np.setdiff1d(np.arange(self.windows), self.active(latent).windows, assume_unique=True)
        return [self.example(latent, window) for window in generator.permutation(windows)[:n].tolist()]

    def shuffled(self, generator: np.random.Generator) -> "Contexts":
        """A control: what fires in each window is moved, as a whole, to a random window with as many tokens.

        Densities, ranks, and how activations lie within windows stay; what they have to do with the text is lost.
        """
        lengths = np.diff(self.starts)
        moved = np.arange(len(self.token))
        for length in np.unique(lengths):
            here = self.starts[:-1][lengths == length]
            offsets = np.arange(length)
            moved[here[:, None] + offsets] = generator.permutation(here)[:, None] + offsets
        latents = np.repeat(np.arange(self.latents, dtype=np.int32), np.diff(self.pointers))
        firings = (moved[self.rows], self.values, self.ranks)
        index = _by_latent(latents, *firings, rows=len(self.token), latents=self.latents)
        return Contexts(self.k, self.window, self.document, self.position, self.token, self.starts, *index)


def _windows(
    document: Int[np.ndarray, " rows"], position: Int[np.ndarray, " rows"], window: int
) -> tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " window_bounds"]]:
    """(rows of windows that are at least half there, in order; where each window starts among them)."""
    order = np.lexsort((position, document))
    place = np.stack([document[order], position[order] // window])
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(place, axis=1) != 0).any(axis=0)
    sizes = np.diff(np.append(np.flatnonzero(new), len(order)))
    kept = np.repeat(2 * sizes >= window, sizes)
    return order[kept], np.append(0, np.cumsum(sizes[2 * sizes >= window]))


def _by_latent(
    latent: Int[np.ndarray, " firings"],
    row: Int[np.ndarray, " firings"],
    value: Float[np.ndarray, " firings"],
    rank: Int[np.ndarray, " firings"],
    *,
    rows: int,
    latents: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(pointers, rows, values, ranks) in order of latents, and of rows within each."""
    # scipy's counting sort is many times faster than sorting pairs; the matrix carries places, not values.
    index = sparse.coo_array((np.arange(len(latent)), (row, latent)), shape=(rows, latents)).tocsc()
    return index.indptr, index.indices, value[index.data], rank[index.data]
