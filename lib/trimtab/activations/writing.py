"""Writing the activation cache: one pass through the model, resumable at any moment, the same bytes either way."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from trimtab.activations.reading import CHUNK, ActivationCache, SiteStatistics
from trimtab.checkpoint import file_sha256, fingerprint, load_tensors, read_json, save_tensors, write_json
from trimtab.corpus import Batch, Blocks
from trimtab.errors import InputError
from trimtab.files import check_path
from trimtab.interventions import capture, device_of
from trimtab.validation import at_least, listed, one_of, require

if TYPE_CHECKING:
    from nnsight import TransformersModel

FORMAT = 1
OUTLIER_FACTOR = 4.0
OWN = re.compile(r"shard-\d{5,}\.safetensors|means\.safetensors")
"""Names of the files of a cache that are not finished without a journal."""


@dataclass(frozen=True)
class ActivationsConfig:
    """What to capture, and how it is laid out."""

    sites: tuple[int, ...] = (14,)
    """Decoder blocks, counted from 0, after which the residual stream is taken."""
    train_tokens: int = 400_000
    """Budget of the train split, in tokens."""
    test_tokens: int = 60_000
    """Budget of the test split, in tokens."""
    val_tokens: int = 20_000
    """Budget of the validation split, in tokens."""
    batch_blocks: int = 16
    """Blocks in one forward pass."""
    shard_blocks: int = 512
    """Blocks in one shard; a multiple of batch_blocks."""
    compute_dtype: str = "bfloat16"
    """Precision of the forward pass: bfloat16 or float32. The cache itself is bf16."""

    def __post_init__(self) -> None:
        listed(self, "sites", least=0)
        at_least(1, self, "train_tokens", "test_tokens", "val_tokens", "batch_blocks", "shard_blocks")
        rule = f"a multiple of `batch_blocks` = {self.batch_blocks}"
        require(self.shard_blocks % self.batch_blocks == 0, "shard_blocks", self.shard_blocks, rule)
        one_of(("bfloat16", "float32"), self, "compute_dtype")


def write_cache(
    folder: Path,
    wrapped: "TransformersModel",
    blocks: Blocks,
    config: ActivationsConfig,
    *,
    identity: dict[str, Any],
    bos: int | None,
    pad: int,
    reference: "ActivationCache | None" = None,
) -> dict[str, Any]:
    """Capture `blocks` into `folder` and return the manifest. Killed at any moment, a second call resumes it.

    `identity` says which model and tokenizer the activations are of. `reference` is the train cache, whose threshold,
    mean and scale are taken over; without one they are computed here. Raises InputError where the folder holds a cache
    of another identity, or a finished shard no longer has its checksum.
    """
    complete_identity = {
        **identity, "blocks": blocks.digest, "config": asdict(config), "dtype": "bfloat16", "format": FORMAT,
    }  # fmt: skip
    mark = fingerprint(complete_identity)
    check_path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: name a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "manifest.json").exists():
        manifest = _of_this(folder / "manifest.json", mark)
        if (folder / "journal.json").exists():  # where the last call was killed just before its end
            _of_this(folder / "journal.json", mark)
            (folder / "journal.json").unlink()
        return manifest
    done = _resume(folder, mark)
    device = device_of(wrapped)
    starts = range(0, len(blocks), config.shard_blocks)
    bar = tqdm(total=blocks.tokens, desc=f"capture {folder.name}", unit="token", mininterval=1)
    for index, start in enumerate(starts):
        name = f"shard-{index:05d}.safetensors"
        if index < len(done):
            bar.update(done[index]["tokens"])
            continue
        stop = min(start + config.shard_blocks, len(blocks))
        parts: list[dict[str, Tensor]] = []
        for batch in blocks.batches(start, stop, config.batch_blocks, pad, bos):
            captured = capture(wrapped, batch.input_ids.to(device), batch.attention_mask.to(device), config.sites)
            parts.append(_rows(batch, captured))
            bar.update(int(batch.attention_mask.sum()) - batch.lead * len(batch.input_ids))
        rows = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        save_tensors(folder / name, rows, {"fingerprint": mark, "index": str(index)})
        tokens = sum(blocks.dataset["length"][start:stop])
        count = {"name": name, "rows": len(rows["token"]), "blocks": stop - start, "tokens": tokens}
        done.append({**count, "sha256": file_sha256(folder / name)})
        write_json(folder / "journal.json", {"fingerprint": mark, "shards": done})
    bar.close()
    return _finish(folder, complete_identity, mark, done, config.sites, reference)


def _rows(batch: Batch, captured: dict[int, Tensor]) -> dict[str, Tensor]:
    """Flatten one batch to rows, without padding and without the first position of each pass."""
    keep = batch.attention_mask.bool()
    keep[:, 0] = False
    within = torch.arange(keep.shape[1]) - batch.lead
    rows: dict[str, Tensor] = {
        "token": batch.input_ids[keep].int(),
        "document": batch.document[:, None].expand_as(keep)[keep].int(),
        "position": (batch.start[:, None] + within)[keep].int(),
    }
    norms = []
    for site, hidden in captured.items():
        kept = hidden.cpu()[keep].bfloat16()
        rows[f"layers.{site}"] = kept
        norms.append(kept.float().norm(dim=1))
    rows["norms"] = torch.stack(norms, dim=1)
    return rows


def _resume(folder: Path, mark: str) -> list[dict[str, Any]]:
    """The shards that an earlier, interrupted call finished; one that it left without an entry is written again."""
    journal = folder / "journal.json"
    done: list[dict[str, Any]] = []
    if journal.exists():
        done = _of_this(journal, mark)["shards"]
        for shard in done:
            if not (folder / shard["name"]).is_file() or file_sha256(folder / shard["name"]) != shard["sha256"]:
                raise InputError(f"{folder / shard['name']} is damaged or missing: delete {folder} and run again.")
    elif foreign := [path for path in folder.glob("*") if OWN.fullmatch(path.name)]:
        raise InputError(f"{foreign[0]} is of no capture that goes on here: name an empty folder, or remove it first.")
    else:
        write_json(journal, {"fingerprint": mark, "shards": []})
    return done


def _of_this(path: Path, mark: str) -> dict[str, Any]:
    """A manifest or journal. Raises InputError where it is of another capture, or of none."""
    found = read_json(path)
    if not isinstance(found, dict) or "fingerprint" not in found:
        raise InputError(f"{path} is of no capture: name another folder, or move it away.")
    if found["fingerprint"] != mark:
        raise InputError(f"{path.parent} holds activations of another model, text or configuration: delete it first.")
    return found


def _finish(
    folder: Path,
    identity: dict[str, Any],
    mark: str,
    shards: list[dict[str, Any]],
    sites: tuple[int, ...],
    reference: ActivationCache | None,
) -> dict[str, Any]:
    handles = [safe_open(str(folder / shard["name"]), framework="pt") for shard in shards]
    norms = torch.cat([handle.get_tensor("norms") for handle in handles])
    statistics: dict[str, Any] = {}
    means: dict[str, Tensor] = {}
    for column, site in enumerate(sites):
        key, site_norms = f"layers.{site}", norms[:, column]
        finite = site_norms[site_norms.isfinite()]  # a row that is not is left out, as one far too long is
        if not len(finite):
            raise InputError(f"{folder} holds no finite activation at site {site}: try another `compute_dtype`.")
        median = float(finite.median())
        taken = reference.manifest["sites"][str(site)] if reference else None
        threshold = taken["threshold"] if taken else OUTLIER_FACTOR * median
        kept = int((site_norms <= threshold).sum())
        if reference and taken:
            means[key] = load_tensors(reference.folder / "means.safetensors")[0][key]
            scale = taken["scale"]
        else:
            means[key], scale = _mean_and_scale(handles, shards, key, column, threshold)
        found = SiteStatistics(median, float(finite.max()), threshold, len(site_norms) - kept, kept, scale)
        statistics[str(site)] = asdict(found)
    save_tensors(folder / "means.safetensors", means)
    rows = sum(shard["rows"] for shard in shards)
    tokens = sum(shard["tokens"] for shard in shards)
    lead = sum(shard["blocks"] for shard in shards)
    manifest = {
        "format": FORMAT,
        "fingerprint": mark,
        "identity": identity,
        "shards": shards,
        "rows": rows,
        "corpus_tokens": tokens,
        "first_positions_excluded": lead,
        "sites": statistics,
        "means_sha256": file_sha256(folder / "means.safetensors"),
    }
    manifest = json.loads(json.dumps(manifest))
    write_json(folder / "manifest.json", manifest)
    (folder / "journal.json").unlink()
    return manifest


def _mean_and_scale(
    handles: list[Any], shards: list[dict[str, Any]], key: str, column: int, threshold: float
) -> tuple[Tensor, float]:
    """Mean over kept rows, and 1 / root mean square of the centred ones; one streaming pass, sums in fp64."""
    total, squares, count = torch.zeros(()), 0.0, 0
    for handle, shard in zip(handles, shards, strict=True):
        for start in range(0, shard["rows"], CHUNK):
            chunk = slice(start, min(start + CHUNK, shard["rows"]))
            keep = handle.get_slice("norms")[chunk][:, column] <= threshold
            x = handle.get_slice(key)[chunk][keep].double()
            total, squares, count = total + x.sum(0), squares + float(x.square().sum()), count + len(x)
    mean = total / count
    variance = (squares / count - float(mean.square().sum())) / len(mean)
    return mean.float(), variance**-0.5
