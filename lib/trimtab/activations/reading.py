"""Reading a finished activation cache: checked on opening, memory-mapped, shuffled through a bounded buffer."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimtab.checkpoint import file_sha256, load_tensors, metadata_of, read_json
from trimtab.errors import InputError

CHUNK = 1024
"""Rows read at a time where the order does not matter."""


@dataclass(frozen=True)
class SiteStatistics:
    """Norm statistics of one site. Norms are of raw residuals, in the model's units."""

    median_norm: float
    max_norm: float
    threshold: float
    """Rows above it are excluded."""
    excluded: int
    kept: int
    scale: float
    """Multiplies (x - mean)."""


class ActivationCache:
    """A finished cache at one site. Rows are read through memory maps; only a bounded buffer is ever in memory."""

    def __init__(self, folder: str | Path, site: int | None = None, *, checksums: bool = True) -> None:
        """Open and check a cache; `site` may be left out where it holds one. `checksums=False` skips the digests.

        Raises InputError naming an unfinished cache, and a missing, damaged or foreign shard.
        """
        self.folder = Path(folder)
        if not (self.folder / "manifest.json").is_file():
            raise InputError(f"{self.folder} is not a finished activation cache: run `dvc repro activations`.")
        self.manifest = read_json(self.folder / "manifest.json")
        sites = list(map(int, self.manifest["sites"]))
        if site is None and len(sites) == 1:
            site = sites[0]
        if site not in sites:
            raise InputError(f"{self.folder} holds sites {sites}, not {site}: choose one of them.")
        self.site = site
        self.key = f"layers.{site}"
        self.statistics = SiteStatistics(**self.manifest["sites"][str(site)])
        means = self.folder / "means.safetensors"
        if not means.is_file() or file_sha256(means) != self.manifest["means_sha256"]:
            raise InputError(f"{means} does not have the checksum of its manifest: delete {folder} and capture again.")
        self.mean = load_tensors(means)[0][self.key]
        self.shards = [_open_shard(self.folder, shard, self.manifest, checksums) for shard in self.manifest["shards"]]
        self._column = sites.index(site)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return len(self.mean)

    @property
    def rows(self) -> int:
        """Rows that reading serves: stored tokens less this site's outliers."""
        return self.statistics.kept

    def normalise(self, raw: Tensor) -> Tensor:
        """(x - mean) * scale in fp32, `[rows, d_model]`."""
        return (raw.float() - self.mean) * self.statistics.scale

    def read(self, *, raw: bool = False, outliers: bool = False) -> Iterator[dict[str, Tensor]]:
        """All kept rows in order: dicts of `x` (normalised fp32 [n, d_model]), `token`, `document`, `position` [n].

        `raw`: in the model's own units, not normalised. `outliers`: the excluded rows as well, told apart by a column
        `kept` of booleans.
        """
        for shard, entry in zip(self.shards, self.manifest["shards"], strict=True):
            for start in range(0, entry["rows"], CHUNK):
                stop = min(start + CHUNK, entry["rows"])
                kept = self._keep(shard, start, stop)
                keep = slice(None) if outliers else kept
                ids = {name: shard.get_slice(name)[start:stop][keep] for name in ("token", "document", "position")}
                if outliers:
                    ids["kept"] = kept
                x = shard.get_slice(self.key)[start:stop][keep]
                yield {"x": x.float() if raw else self.normalise(x), **ids}

    def batches(
        self, batch: int, *, seed: int, page: int = 256, buffer: int = 65_536, skip: int = 0
    ) -> Iterator[Tensor]:
        """Endless batches of normalised rows `[batch, d_model]` in fp32, shuffled across shards.

        Each epoch draws a new order of all pages (runs of `page` rows of any shard), fills a buffer of about `buffer`
        rows with the next of them, shuffles it and serves it; every kept row comes once an epoch, and what does not
        fill a batch leads the next buffer. `skip` passes over that many batches, as a resumed run must.
        """
        if batch > self.rows:
            raise InputError(f"{self.folder} has {self.rows} rows: too few for a batch of {batch}.")
        pages = [
            (shard, start, min(start + page, entry["rows"]))
            for shard, entry in zip(self.shards, self.manifest["shards"], strict=True)
            for start in range(0, entry["rows"], page)
        ]
        generator = torch.Generator().manual_seed(seed)
        rest = torch.empty(0, self.d_model, dtype=torch.bfloat16)
        while True:
            order = torch.randperm(len(pages), generator=generator).tolist()
            per_buffer = max(1, buffer // page)
            for first in range(0, len(order), per_buffer):
                taken = [rest]
                for index in order[first : first + per_buffer]:
                    shard, start, stop = pages[index]
                    taken.append(shard.get_slice(self.key)[start:stop][self._keep(shard, start, stop)])
                rows = torch.cat(taken)
                rows = rows[torch.randperm(len(rows), generator=generator)]
                whole = len(rows) // batch * batch
                for i in range(0, whole, batch):
                    if skip:
                        skip -= 1
                        continue
                    yield self.normalise(rows[i : i + batch])
                rest = rows[whole:].clone()

    def _keep(self, shard: Any, start: int, stop: int) -> Tensor:
        return shard.get_slice("norms")[start:stop][:, self._column] <= self.statistics.threshold


def _open_shard(folder: Path, shard: dict[str, Any], manifest: dict[str, Any], checksums: bool) -> Any:
    path = folder / shard["name"]
    if not path.is_file():
        raise InputError(f"{path} is missing: delete {folder} and run `dvc repro activations`.")
    if checksums and file_sha256(path) != shard["sha256"]:
        raise InputError(f"{path} does not have the checksum of its manifest: delete {folder} and capture again.")
    try:
        handle = safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}): delete {folder} and capture again.") from None
    if metadata_of(handle).get("fingerprint") != manifest["fingerprint"]:
        raise InputError(f"{path} belongs to another cache: delete {folder} and capture again.")
    return handle
