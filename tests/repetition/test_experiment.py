"""An arm from texts to readings on a tiny model: the texts, the sweep's rule, resumption, and what is written."""

import math
from dataclasses import fields, replace

import polars as pl
import pytest
import torch

from trimtab.errors import InputError
from trimtab.repetition import experiment, reading
from trimtab.repetition.config import RepetitionConfig
from trimtab.repetition.experiment import Bench, Sweep, row_nats, sweep
from trimtab.repetition.ngrams import seq_rep
from trimtab.repetition.texts import Library
from trimtab.rl.policy import Policy

CONFIG = RepetitionConfig(
    updates=3, prefixes=2, prefix_tokens=8, tokens=10, n=2, readings=1, learning_rates=(1e-3, 3e-3),
    adapter_rate_factor=10.0, seeds=(0, 1), val_prefixes=3, val_tokens=100, test_prefixes=5, decoder_prefixes=4,
    other_prefixes=2, test_tokens=300, other_tokens=300, row_tokens=100, decoders=("greedy", "nucleus-0.9"),
    once_decoders=("beam-2",), base_decoders=("no-repeat-2",), sentences=0, repeats=3, dtype="float32",
)  # fmt: skip


@pytest.fixture
def bench(model_folder, corpus_folder):
    def make(arm="implicit-steering", **changes):
        return Bench.of(arm, replace(CONFIG, **changes), str(model_folder), str(corpus_folder), "cpu")

    return make


def test_passages_are_beginnings_of_blocks_of_their_domain(corpus_folder, tokenizer):
    library = Library(corpus_folder)
    texts = {domain: library.passages("test", domain, 20, 100, 0) for domain in ("wikipedia", "sotu")}
    for domain, word in (("wikipedia", "word"), ("sotu", "speech")):
        assert texts[domain].tokens.shape[1] == 20
        assert word in str(tokenizer.decode(texts[domain].tokens.flatten().tolist()))
        assert all(group.startswith("toy" if domain == "wikipedia" else "speeches") for group in texts[domain].group)
    assert not set(texts["wikipedia"].group) & set(library.passages("train", "wikipedia", 20, 100, 0).group)
    some = library.passages("test", "wikipedia", 20, 3, 0)
    assert torch.equal(some.tokens, texts["wikipedia"].tokens[:3])  # fewer are the first of the more


def test_rows_run_through_a_document_and_never_across(corpus_folder, tokenizer):
    library = Library(corpus_folder)
    documents = pl.read_parquet(corpus_folder / "documents.parquet")
    rows = library.rows("test", "wikipedia", 100, 1_000_000, 0)
    assert max(len(row) for row, _ in rows) == 100  # longer than any block
    texts = documents.filter(pl.col("split") == "test")["text"].to_list()
    for row, _ in rows:
        piece = str(tokenizer.decode(row.tolist())).strip("\ufffd")
        assert any(piece in text for text in texts)
    assert sum(len(row) for row, _ in library.rows("test", "wikipedia", 100, 250, 0)) in range(250, 350)


def test_what_is_missing_is_named(corpus_folder, tmp_path, bench):
    with pytest.raises(InputError, match=r"sources\.parquet is missing: run the stage that writes it"):
        Library(tmp_path)
    with pytest.raises(InputError, match="no test text of kind 'poems'; there are sotu, wikipedia"):
        Library(corpus_folder).passages("test", "poems", 8, 1, 0)
    with pytest.raises(InputError, match="has 49 tokens"):
        Library(corpus_folder).passages("test", "wikipedia", 49, 1, 0)
    with pytest.raises(InputError, match="not an arm"):
        bench("implicitly")
    with pytest.raises(InputError, match="not a decoder"):
        bench(decoders=("greedy", "luck"))


def test_validation_is_the_mean_over_tokens(bench, tiny_llama):
    made = bench()
    rows = [row for row, _ in made.library.rows("val", "wikipedia", 100, 100, 0)]
    with torch.no_grad():
        sums = [float(tiny_llama(row[None], labels=row[None]).loss) * (len(row) - 1) for row in rows]
    expected = sum(sums) / sum(len(row) - 1 for row in rows)
    assert made.validate(made.policy()) == pytest.approx(expected, rel=1e-5)


def swept(*rows, untrained=20.0):
    table = pl.DataFrame(rows, schema=["learning_rate", "kept", "val_perplexity", "val_seq_rep"], orient="row")
    return Sweep(table, untrained)


def test_the_rate_that_repeats_least_within_the_ceiling_is_taken():
    assert swept((0.1, 3, 20.1, 0.3), (0.2, 3, 20.2, 0.2), (0.3, 3, 20.21, 0.1)).best == 0.2
    assert swept((0.1, 3, 20.3, 0.3), (0.2, 3, 20.4, 0.2)).best == 0.1  # none is within: the least perplexity
    assert swept((0.2, 3, 19.0, 0.2), (0.1, 3, 19.0, 0.2)).best == 0.1  # of equals the lower


def test_an_arm_that_falls_apart_everywhere_says_so(bench, tmp_path, monkeypatch):
    made = bench()
    monkeypatch.setattr(Bench, "validate", lambda self, policy: math.nan if policy.trained else 3.0)
    with pytest.raises(InputError, match="falls apart at every learning rate"):
        sweep(made, Policy(made.policy().view, {}), tmp_path)


def test_an_arm_is_swept_trained_and_read_and_goes_on_where_it_was(bench, tmp_path, monkeypatch):
    made = bench()
    found = sweep(made, made.policy(), tmp_path)
    assert found.table["learning_rate"].to_list() == [0.01, 0.03]
    assert len(list(tmp_path.glob("*/seed-0-rate-*.safetensors"))) == 1  # of the rate not chosen nothing is kept
    readings = reading.read_all(made, found, tmp_path)
    assert readings.texts["seed"].unique().to_list() == [0, 1]
    assert readings.texts.group_by("domain", "decoder", "seed").len().sort("domain", "decoder", "seed").rows() == [
        ("sotu", "greedy", 0, 2), ("sotu", "greedy", 1, 2), ("wikipedia", "beam-2", 0, 4),
        ("wikipedia", "greedy", 0, 5), ("wikipedia", "greedy", 1, 5),
        ("wikipedia", "nucleus-0.9", 0, 4), ("wikipedia", "nucleus-0.9", 1, 4),
    ]  # fmt: skip
    assert set(map(len, readings.texts["tokens"])) == {10}
    assert readings.validations["kept"].sum() == 2
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("seed-*/*.parquet")}
    monkeypatch.setattr(Bench, "train", lambda *_: pytest.fail("trained again"))
    again_swept = sweep(made, made.policy(), tmp_path)
    assert again_swept.table.equals(found.table)
    again = reading.read_all(made, again_swept, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("seed-*/*.parquet")} == stamps
    assert again.texts.equals(readings.texts)
    out = tmp_path / "out"
    out.mkdir()
    reading.keep(made, readings, tmp_path, out)
    assert {path.name for path in out.iterdir()} == {
        "history.parquet", "validations.parquet", "texts.parquet", "nats.parquet", "sentences.parquet",
        "single.parquet", "truncated.parquet", "seed-0", "seed-1",
    }  # fmt: skip


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_processes_of_their_own_come_to_the_same(bench, tmp_path):
    readings = []
    for workers in (1, 2):
        made = bench(workers=workers)
        folder = tmp_path / str(workers)
        found = sweep(made, made.policy(), folder)
        readings.append(reading.read_all(made, found, folder))
    for field in fields(reading.Readings):
        one, two = (getattr(each, field.name) for each in readings)
        assert one.equals(two), field.name


def test_the_untrained_model_is_read_once_with_what_needs_no_training(bench, tmp_path, tiny_llama):
    made = bench("untrained", sentences=2)
    readings = reading.read_all(made, None, tmp_path)
    assert readings.texts["decoder"].unique(maintain_order=True).to_list() == [
        "greedy", "nucleus-0.9", "beam-2", "no-repeat-2",
    ]  # fmt: skip
    blocked = readings.texts.filter(pl.col("decoder") == "no-repeat-2")["tokens"].to_list()
    assert seq_rep(torch.tensor(blocked), 2).max() == 0
    assert readings.history.is_empty()
    table = reading.repetition_of(readings.texts)
    assert table.filter(pl.col("decoder") == "no-repeat-2")["seq_rep_2"].to_list() == [0.0]
    out = tmp_path / "out"
    out.mkdir()
    reading.keep(made, readings, tmp_path, out)
    people = pl.read_parquet(out / "human.parquet")
    passages = made.passages("wikipedia")
    first = people.filter(pl.col("domain") == "wikipedia")
    assert first["tokens"].to_list() == passages.tokens[:, 8:].tolist()
    assert first["prefix"].to_list() == passages.tokens[:, :8].tolist()
    rows = made.library.rows("test", "sotu", 100, 300, 0)
    of_other = readings.nats.filter(pl.col("domain") == "sotu")
    for (row, group), nats, tokens, named in zip(
        rows, of_other["nats"], of_other["tokens"], of_other["group"], strict=True
    ):
        with torch.no_grad():
            loss = float(tiny_llama(row[None], labels=row[None]).loss)
        assert (named, tokens) == (group, len(row) - 1)
        assert nats == pytest.approx(loss * tokens, rel=1e-4)
    perplexity = reading.perplexities(readings.nats).filter(pl.col("domain") == "wikipedia")["perplexity"][0]
    assert perplexity == pytest.approx(readings.single["ppl"][0], rel=1e-6)


def test_nothing_is_predicted_of_a_first_token(bench):
    made = bench("untrained")
    row = torch.arange(12)
    assert len(row_nats(made.policy(), row)) == 11


def test_brackets_stand_around_what_is_masked(tokenizer):
    tokens = torch.tensor(tokenizer("ab\x1b[31mc")["input_ids"])
    mask = torch.tensor([False, True, *[True] * (len(tokens) - 3), False])
    assert reading.bracketed(tokenizer, tokens, mask) == "a⟦b␛[31m⟧c"


def test_rates_of_vectors_are_the_grid_times_a_factor(bench):
    assert bench("implicit").rates() == [1e-3, 3e-3]
    assert bench("implicit-lora-2").rates() == pytest.approx([1e-2, 3e-2])
    assert math.isfinite(experiment.CEILING)
