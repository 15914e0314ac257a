"""Small real parts: a random two-layer Llama, a byte-level tokenizer, and a planted activation cache."""

import gc
import os

# Of what the tests start: notebooks have two threads each, and two run at once. Threads that spin while they wait for
# one another make minutes of seconds then.
os.environ["OMP_WAIT_POLICY"] = "passive"

import beartype  # noqa: F401 (what checks types cannot be imported any more once a pybind11 module is)
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # as in the pipeline; in a notebook a bar is a widget among others
if not torch.cuda.is_available():  # before anything imports Triton, as transformers does where it is installed
    os.environ["TRITON_INTERPRET"] = "1"

import re
import shutil
from pathlib import Path

import polars as pl
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab.activations import ActivationCache
from trimtab.activations.writing import ActivationsConfig, write_cache
from trimtab.corpus import Blocks, CorpusConfig, split_documents, token_blocks
from trimtab.interventions import wrap
from trimtab.texts import DOCUMENTS

gc.set_threshold(100_000, 50, 100)  # what is collected is a million objects, and no garbage
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
ROOT = Path(__file__).parents[1]
HEAVY = re.compile(
    r"pipeline/site/|pipeline/test_(encodings|faults|inputs|kernel|new|normalising|notebook|places)\.py"
    r"|pipeline/test_(records_cli|report|run|terminal|verify)\.py"
    r"|test_(activations|code|comparison|explore|families|golden|imports|lab|launch|readme|resuming|types)\.py"
    r"|training|experiment|exchange|triton|test_model|TestGuard|read_only_installation|a_fork_of|own_layer|every_process"
)
"""Tests that start kernels, DVC, processes or a browser, train something, or simulate: `make check` leaves them out"""
MODELS = {"tiny_llama", "model_folder", "caches", "browser"}
"""Fixtures whose tests `make check` leaves out as well."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The pipeline's tests take minutes: first, so that one worker runs them while the other runs the rest; last what
    starts from the pipeline's results."""
    for item in items:
        if HEAVY.search(item.nodeid) or MODELS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.heavy)
    items.sort(key=lambda item: (_has(item, "after_pipeline"), not _has(item, "pipeline")))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(700, 10, 10)


def _has(item: pytest.Item, marker: str) -> bool:
    return item.get_closest_marker(marker) is not None


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("needs a browser: install Chromium (Debian: apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        running = playwright.chromium.launch(executable_path=program, args=options, timeout=300_000)
        yield running
        running.close()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i + 2 for i, c in enumerate(alphabet)} | {"<s>": 0, "</s>": 1}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model_folder(tiny_llama, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def documents() -> pl.DataFrame:
    """Forty documents of one source; lengths differ, some with characters of several bytes."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i in range(40):
        words = torch.randint(0, 200, (30 + 13 * (i % 7),), generator=generator).tolist()
        text = " ".join(f"word{w}" if w % 11 else f"wörd{w}…" for w in words)
        rows.append(("toy", f"doc-{i}", f"group-{i // 2}", f"Title {i}\n\n{text}\n\nThe end of {i}."))
    return pl.DataFrame(rows, schema=DOCUMENTS, orient="row")


@pytest.fixture(scope="session")
def blocks_file(documents, tokenizer, tmp_path_factory) -> Path:
    config = CorpusConfig(block_tokens=32, min_block_tokens=8, val_fraction=0.2, test_fraction=0.2)
    path = tmp_path_factory.mktemp("corpus") / "blocks.parquet"
    token_blocks(split_documents(documents, config, seed=0), tokenizer, config).write_parquet(path)
    return path


@pytest.fixture(scope="session")
def cache_config() -> ActivationsConfig:
    return ActivationsConfig(sites=(0, 1), batch_blocks=4, shard_blocks=16, compute_dtype="float32")


@pytest.fixture(scope="session")
def caches(tiny_llama, tokenizer, blocks_file, cache_config, tmp_path_factory) -> Path:
    """Finished train, val and test caches of the tiny model at two sites."""
    folder = tmp_path_factory.mktemp("activations")
    wrapped = wrap(tiny_llama, tokenizer)
    reference = None
    for split, budget in (("train", 6000), ("val", 1500), ("test", 1500)):
        blocks = Blocks(blocks_file, split, budget)
        write_cache(
            folder / split, wrapped, blocks, cache_config, identity={"model": "tiny"}, bos=0, pad=1, reference=reference
        )
        reference = reference or ActivationCache(folder / "train", 0)
    return folder
