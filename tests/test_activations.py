"""The cache holds what the model computed, survives kills, refuses damage, and is read shuffled but whole."""

import copy
import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trimtab.activations import ActivationCache
from trimtab.activations.writing import OUTLIER_FACTOR, ActivationsConfig, write_cache
from trimtab.checkpoint import load_tensors
from trimtab.corpus import Blocks
from trimtab.errors import InputError
from trimtab.files import write_json
from trimtab.interventions import wrap


def stored(folder, name):
    return torch.cat([load_tensors(path)[0][name] for path in sorted(folder.glob("shard-*"))])


@pytest.fixture(scope="module")
def naive(tiny_llama, blocks_file):
    """Every block of train alone through plain transformers: {site: rows}, and the ids of each row."""
    blocks = Blocks(blocks_file, "train", 6000)
    rows, ids = {0: [], 1: []}, []
    for row in blocks.dataset:
        with torch.inference_mode():
            states = tiny_llama(torch.tensor([[0, *row["tokens"]]]), output_hidden_states=True).hidden_states
        for site, kept in rows.items():
            kept.append(states[site + 1][0, 1:].bfloat16())
        ids += [(token, row["document"], row["start"] + i) for i, token in enumerate(row["tokens"])]
    return {site: torch.cat(kept) for site, kept in rows.items()}, ids


def test_rows_are_the_models_own_without_bos_and_padding(caches, naive):
    want, ids = naive
    for site in (0, 1):
        got = stored(caches / "train", f"layers.{site}").float()
        torch.testing.assert_close(got, want[site].float(), rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(stored(caches / "train", "norms")[:, site], got.norm(dim=1))
    columns = [stored(caches / "train", name).tolist() for name in ("token", "document", "position")]
    assert list(zip(*columns, strict=True)) == ids


def test_outliers_scale_and_mean_follow_the_documented_rule(caches):
    for site in (0, 1):
        raw = stored(caches / "train", f"layers.{site}").double()
        norms = raw.float().norm(dim=1)
        keep = norms <= OUTLIER_FACTOR * norms.median()
        cache = ActivationCache(caches / "train", site)
        assert (cache.statistics.kept, cache.statistics.excluded) == (int(keep.sum()), int((~keep).sum()))
        torch.testing.assert_close(cache.mean, raw[keep].mean(0).float())
        want = ((raw[keep] - raw[keep].mean(0)) / (raw[keep] - raw[keep].mean(0)).square().mean().sqrt()).float()
        got = torch.cat([chunk["x"] for chunk in cache.read()])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        test = ActivationCache(caches / "test", site)
        assert torch.equal(test.mean, cache.mean)
        assert (test.statistics.scale, test.statistics.threshold) == (
            cache.statistics.scale,
            cache.statistics.threshold,
        )


def lower_threshold(folder, target):
    """Copy a cache and set site 0's threshold to 0.9 of its median norm, so that many rows lie above; rows left."""
    shutil.copytree(folder, target)
    manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
    threshold = float(stored(target, "norms")[:, 0].median()) * 0.9
    manifest["sites"]["0"]["threshold"] = threshold
    kept = int((stored(target, "norms")[:, 0] <= threshold).sum())
    manifest["sites"]["0"]["kept"] = kept
    (target / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return kept


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_left_out_and_counted(
    tiny_llama, tokenizer, blocks_file, cache_config, tmp_path, value
):
    """One token's embedding is harmed: its row, and what attends to it, are no numbers."""
    model = copy.deepcopy(tiny_llama)
    blocks = Blocks(blocks_file, "train", 2000)
    token = blocks.dataset[3]["tokens"][-1]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = value
    write_cache(
        tmp_path / "c", wrap(model, tokenizer), blocks, cache_config, identity={"model": "harmed"}, bos=0, pad=1
    )
    cache = ActivationCache(tmp_path / "c", 0)
    norms = stored(tmp_path / "c", "norms")[:, 0]
    assert 0 < int((~norms.isfinite()).sum()) <= cache.statistics.excluded
    x = torch.cat([chunk["x"] for chunk in cache.read()])
    assert len(x) == cache.rows > 0
    assert x.isfinite().all()
    assert cache.mean.isfinite().all()


def test_a_model_that_computes_no_numbers_is_named(tiny_llama, tokenizer, blocks_file, cache_config, tmp_path):
    model = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(torch.nan)
    blocks = Blocks(blocks_file, "train", 500)
    with pytest.raises(InputError, match="holds no finite activation at site 0"):
        write_cache(tmp_path / "c", wrap(model, tokenizer), blocks, cache_config, identity={}, bos=0, pad=1)


def test_reading_skips_rows_above_the_threshold(caches, tmp_path):
    kept = lower_threshold(caches / "train", tmp_path / "copy")
    cache = ActivationCache(tmp_path / "copy", 0)
    assert 0 < kept < cache.manifest["rows"]
    assert sum(len(chunk["x"]) for chunk in cache.read()) == kept
    batches = cache.batches(50, seed=0, page=16, buffer=200)
    raw = torch.cat([next(batches) for _ in range(kept // 50)]) / cache.statistics.scale + cache.mean
    assert raw.norm(dim=1).max() <= cache.statistics.threshold * 1.01


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 700), st.integers(1, 300), st.integers(1, 3000), st.integers(0, 5))
def test_an_epoch_serves_every_row_once(caches, batch, page, buffer, seed):
    cache = ActivationCache(caches / "train", 1, checksums=False)
    batches = cache.batches(batch, seed=seed, page=page, buffer=buffer)
    count = 2 * cache.rows // batch
    served = torch.cat([next(batches) for _ in range(count)])
    rows = torch.cat([chunk["x"] for chunk in cache.read()])
    _, whole = rows.unique(dim=0, return_counts=True)
    ids, places = torch.cat([rows, served]).unique(dim=0, return_inverse=True)
    times = torch.bincount(places[len(rows) :], minlength=len(ids))
    originals = torch.bincount(places[: len(rows)], minlength=len(ids))
    assert len(whole) == len(ids), "a row was served that the cache does not hold"
    missing = 2 * cache.rows - len(served)
    assert (2 * originals - times).clamp(min=0).sum() == missing
    assert (times <= 2 * originals).all()


def test_order_depends_on_the_seed_mixes_shards_and_resumes(caches):
    cache = ActivationCache(caches / "train", 0)
    assert len(cache.shards) > 3
    first = [next(it) for it in [cache.batches(64, seed=0, page=16, buffer=512)] for _ in range(40)]
    again = cache.batches(64, seed=0, page=16, buffer=512, skip=23)
    assert all(torch.equal(next(again), batch) for batch in first[23:])
    assert not torch.equal(next(cache.batches(64, seed=1, page=16, buffer=512)), first[0])
    where = {
        tuple(x[:4].tolist()): int(d)
        for chunk in cache.read()
        for x, d in zip(chunk["x"], chunk["document"], strict=True)
    }
    assert len({where[tuple(x[:4].tolist())] for x in first[0]}) > 8


CODE = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from trimtab.activations.writing import ActivationsConfig, write_cache
from trimtab.corpus import Blocks
from trimtab.interventions import wrap
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
wrapped = wrap(model, AutoTokenizer.from_pretrained(sys.argv[1]))
config = ActivationsConfig(sites=(0, 1), batch_blocks=2, shard_blocks=4, compute_dtype="float32")
print("ready", flush=True)
write_cache(Path(sys.argv[3]), wrapped, Blocks(Path(sys.argv[2]), "train"), config, identity={"m": 1}, bos=0, pad=1)
print("finished", flush=True)
"""


def test_a_writer_killed_at_random_moments_ends_with_the_same_bytes(model_folder, blocks_file, tmp_path):
    def start(folder):
        command = [sys.executable, "-c", CODE, str(model_folder), str(blocks_file), str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8")
        assert process.stdout.readline() == "ready\n"
        return process

    began = time.monotonic()
    process = start(tmp_path / "whole")
    ready = time.monotonic()
    assert process.communicate()[0] == "finished\n"
    needed = time.monotonic() - ready
    chance = random.Random(0)
    kills = 0
    for _ in range(2):
        process = start(tmp_path / "broken")
        time.sleep(chance.uniform(0.1, 0.5) * needed)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        process.stdout.close()
    assert kills, f"the writer finished too soon to be killed ({needed:.2f} s after {ready - began:.2f} s)"
    assert start(tmp_path / "broken").communicate()[0] == "finished\n"
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "broken").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes(), name


@pytest.fixture
def writer(tiny_llama, tokenizer, blocks_file, cache_config):
    def write(folder, **identity):
        blocks = Blocks(blocks_file, "train", 6000)
        return write_cache(
            folder,
            wrap(tiny_llama, tokenizer),
            blocks,
            cache_config,
            identity={"model": "tiny"} | identity,
            bos=0,
            pad=1,
        )

    return write


def test_a_finished_cache_is_not_computed_again(caches, writer, tmp_path, monkeypatch):
    shutil.copytree(caches / "train", tmp_path / "copy")
    held = ActivationCache(caches / "train", 0).manifest
    journal = {"fingerprint": held["fingerprint"], "shards": held["shards"]}
    write_json(tmp_path / "copy/journal.json", journal)  # as a kill between manifest and clean-up leaves it
    monkeypatch.setattr("trimtab.activations.writing.capture", None)
    assert writer(tmp_path / "copy") == ActivationCache(caches / "train", 0).manifest
    assert not (tmp_path / "copy/journal.json").exists()


def test_activations_of_another_model_are_not_overwritten(caches, writer, tmp_path):
    shutil.copytree(caches / "train", tmp_path / "copy")
    with pytest.raises(InputError, match="holds activations of another model"):
        writer(tmp_path / "copy", model="other")
    assert (tmp_path / "copy/manifest.json").exists()


def flip(path):
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip(f / "shard-00002.safetensors"), r"shard-00002\.safetensors does not have the checksum"),
        (lambda f: (f / "shard-00001.safetensors").unlink(), r"shard-00001\.safetensors is missing"),
        (lambda f: flip(f / "means.safetensors"), r"means\.safetensors does not have the checksum"),
        (lambda f: (f / "manifest.json").unlink(), "is not a finished activation cache"),
    ],
)
def test_damage_is_named(caches, tmp_path, damage, message):
    shutil.copytree(caches / "train", tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(InputError, match=message):
        ActivationCache(tmp_path / "copy", 0)


def test_a_foreign_shard_is_named_even_without_checksums(caches, tmp_path):
    shutil.copytree(caches / "train", tmp_path / "copy")
    shutil.copy(caches / "test/shard-00000.safetensors", tmp_path / "copy/shard-00000.safetensors")
    with pytest.raises(InputError, match=r"shard-00000\.safetensors belongs to another cache"):
        ActivationCache(tmp_path / "copy", 0, checksums=False)


def test_sites_and_sizes_are_checked(caches):
    with pytest.raises(InputError, match=r"holds sites \[0, 1\], not 7"):
        ActivationCache(caches / "train", 7)
    cache = ActivationCache(caches / "val", 0)
    with pytest.raises(InputError, match="too few for a batch of 100000"):
        next(cache.batches(100_000, seed=0))
    with pytest.raises(InputError, match="`shard_blocks` must be a multiple of `batch_blocks` = 16, not 24"):
        ActivationsConfig(shard_blocks=24)
    with pytest.raises(InputError, match="`sites` must be a list of at least one item, each of them once"):
        ActivationsConfig(sites=(1, 1))
