"""Passages are what the cache holds, pooling is a mean, and no probe or choice of latents sees what it is tested on."""

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from trimtab.activations import ActivationCache
from trimtab.errors import InputError
from trimtab.sae import probing
from trimtab.sae.model import SAE
from trimtab.sae.passages import (
    Passages,
    label_documents,
    pooled_latents,
    pooled_residual,
    sample_passages,
    strongest_rows,
)
from trimtab.sae.probing import ProbeConfig, Scores, Task


@pytest.fixture
def opened(caches) -> list[ActivationCache]:
    return [ActivationCache(caches / split, 0) for split in ("train", "test")]


@pytest.fixture
def sample(opened) -> Passages:
    labels = pl.DataFrame({"document": range(40), "group": [f"g{i // 2}" for i in range(40)]})
    labels = labels.with_columns(pl.col("document").cast(pl.Int32))
    return sample_passages(opened, labels, tokens=8, per_document=2, seed=1)


@pytest.fixture
def sae() -> SAE:
    return SAE(16, 24, 6, generator=torch.Generator().manual_seed(0))


def task_of(labels: np.ndarray, groups: np.ndarray, folds: int = 5) -> Task:
    table = pl.DataFrame({"document": np.arange(len(labels)), "group": groups, "source": labels})
    table = table.with_columns(pl.lit(None, pl.Boolean).alias(name) for name in ("century", "postwar", "party"))
    passages = Passages(table, np.arange(len(labels) + 1), torch.zeros(len(labels), 1), np.zeros(len(labels), int))
    return probing.tasks_of(passages, ProbeConfig(folds=folds), 0)[0]


def balanced(right: np.ndarray, labels: np.ndarray) -> float:
    return balanced_accuracy_score(labels, np.where(right, labels, ~labels))


class TestLabels:
    documents = pl.DataFrame(
        {
            "document": range(6),
            "source": ["sotu"] * 5 + ["wiki"],
            "name": ["1880-Hayes-1", "1905-Roosevelt-1", "1950-Truman-1", "2001-Trump-1", "1867-Johnson-1", "Ant"],
            "group": ["1880", "1905", "1950", "2001", "1867", "Ant"],
        }
    )
    speeches = pl.DataFrame(
        {
            "source": "sotu",
            "name": documents["name"][:5],
            "year": [1880, 1905, 1950, 2001, 1867],
            "president": ["Hayes", "T. Roosevelt", "Truman", "Trump", "A. Johnson"],
            "party": ["Republican", "Republican", "Democratic", "Republican", "National Union"],
        }
    )

    def test_each_task_asks_only_the_documents_it_is_about(self):
        labels = label_documents(self.documents, self.speeches)
        assert labels["group"].to_list() == ["Hayes", "T. Roosevelt", "Truman", "Trump", "A. Johnson", "wiki Ant"]
        assert labels["source"].to_list() == [True] * 5 + [False]
        assert labels["century"].to_list() == [False, True, True, True, False, None]
        assert labels["postwar"].to_list() == [None, False, True, True, None, None]
        assert labels["party"].to_list() == [None, None, True, False, None, None]

    @pytest.mark.parametrize("rows", [slice(0, 5), slice(5, 6)])
    def test_speeches_alone_or_none_at_all_are_no_labels(self, rows):
        with pytest.raises(InputError, match="needs speeches"):
            label_documents(self.documents[rows], self.speeches)


class TestPassages:
    def test_they_are_whole_stretches_of_the_cached_rows(self, opened, sample):
        stored = {}
        for cache in opened:
            for chunk in cache.read(raw=True):
                for i, key in enumerate(zip(chunk["document"].tolist(), chunk["position"].tolist(), strict=True)):
                    stored[key] = (int(chunk["token"][i]), chunk["x"][i])
        assert sample.table.height > 40
        for i, (document, start) in enumerate(sample.table.select("document", "start").iter_rows()):
            rows = range(sample.starts[i], sample.starts[i + 1])
            keys = [(document, p) for p in range(start, start + 8) if (document, p) in stored]
            assert start % 8 == 0
            assert len(keys) == len(rows) == 8
            assert sample.token[rows].tolist() == [stored[key][0] for key in keys]
            assert torch.equal(sample.x[list(rows)], torch.stack([stored[key][1] for key in keys]))

    def test_a_document_gives_at_most_its_share_and_the_seed_decides(self, opened, sample):
        assert sample.table.group_by("document").len()["len"].max() == 2
        assert not sample.table.select("document", "start").is_duplicated().any()
        labels = sample.table.select("document").unique().with_columns(pl.lit("g").alias("group"))
        again, other = (sample_passages(opened, labels, tokens=8, per_document=2, seed=s) for s in (1, 2))
        alone = sample_passages(opened[:1], labels, tokens=8, per_document=2, seed=1)
        assert again.table["start"].equals(sample.table["start"])
        assert not other.table["start"].equals(sample.table["start"])
        both = sample.table.join(alone.table, on=["document", "start"], how="semi")
        assert both.height == alone.table.height, "what other caches hold must not move a document's draw"

    def test_too_long_a_passage_is_named(self, opened):
        with pytest.raises(InputError, match="holds no whole passage of 4096 tokens"):
            sample_passages(opened, pl.DataFrame({"document": [0]}), tokens=4096, per_document=2, seed=0)

    def test_pooling_is_the_mean_of_dense_activations(self, sample, sae, monkeypatch):
        monkeypatch.setattr("trimtab.sae.passages.BATCH", 7)
        pooled = pooled_latents(sae, sample, (2, 6))
        dense = (sample.x @ sae.W_enc.T + sae.b_enc).relu().detach()
        for budget, features in pooled.items():
            kept = torch.where(dense >= dense.topk(budget).values[:, -1:], dense, 0)
            for i, mean in enumerate(features):
                expected = kept[sample.starts[i] : sample.starts[i + 1]].mean(dim=0)
                torch.testing.assert_close(torch.from_numpy(mean).float(), expected)
        residual = pooled_residual(sample)
        np.testing.assert_allclose(residual[3], sample.x[sample.starts[3] : sample.starts[4]].mean(dim=0), rtol=1e-5)

    def test_the_strongest_rows_of_a_latent_and_what_stands_around_them(self, sample, sae):
        latents = sae.encode(sample.x, 6)
        values = torch.where(latents.indices == 5, latents.values, 0).amax(dim=1)
        rows = strongest_rows(sae, 5, sample, 12)
        assert 0 < len(rows) <= 12
        np.testing.assert_allclose(values[rows].detach(), values.sort(descending=True).values[: len(rows)].detach())
        row = int(sample.starts[2]) + 3
        before, token, after = sample.around(row, 2, 100)
        assert before + token + after == sample.token[row - 2 : sample.starts[3]].tolist()
        assert token == [sample.token[row]]
        assert sample.around(int(sample.starts[2]), 5, 1)[0] == []


class TestProbe:
    groups = np.array([f"g{i // 6:02d}" for i in range(240)])
    labels = np.arange(240) // 6 % 2 == 0

    @pytest.fixture
    def generator(self) -> np.random.Generator:
        return np.random.default_rng(0)

    def test_the_strongest_column_is_the_one_whose_means_differ_most(self):
        labels = np.array([True, True, False, False])
        features = np.array([[9.0, 1.0, 0.0, 5], [1, 1.1, 0, 5], [4, 0, 0, 5], [2, 0.1, 0, 5]], dtype=np.float32)
        assert probing.strongest(features, labels, 2).tolist() == [1, 0]
        assert probing.strongest(features, labels, 2, plain=True).tolist() == [0, 1]

    def test_one_planted_column_is_found(self, generator):
        features = generator.normal(size=(240, 50)).astype(np.float32)
        features[:, 17] += 8 * self.labels
        task = task_of(self.labels, self.groups)
        right = probing.sparse_probe(features, task, (1, 5))
        assert balanced(right[1], self.labels) > 0.99
        assert balanced(probing.dense_probe(features, task, 0), self.labels) > 0.95

    def test_columns_are_chosen_without_the_passages_they_are_tested_on(self, generator):
        """Of many columns of noise some part the classes; chosen on all passages, they would do so in the test too."""
        features = generator.normal(size=(240, 4000)).astype(np.float32)
        task = task_of(self.labels, self.groups)
        honest = balanced(probing.sparse_probe(features, task, (20,))[20], self.labels)
        leaking = features[:, probing.strongest(features, self.labels, 20)]
        assert balanced(probing.sparse_probe(leaking, task, (20,))[20], self.labels) > 0.7
        assert 0.35 < honest < 0.65

    def test_recognising_a_group_tells_nothing(self, generator):
        numbers = np.arange(240) // 6
        features = np.eye(40, dtype=np.float32)[numbers] + 0.01 * generator.normal(size=(240, 40))
        features = features.astype(np.float32)
        labels = generator.permutation(np.arange(40) % 2 == 0)[numbers]
        task, careless = task_of(labels, self.groups), task_of(labels, np.arange(240).astype(str))
        assert all(not set(task.groups[a]) & set(task.groups[b]) for a, b in task.folds)
        assert sorted(np.concatenate([test for _, test in task.folds])) == list(range(240))
        assert balanced(probing.sparse_probe(features, careless, (40,))[40], labels) > 0.95
        assert balanced(probing.sparse_probe(features, task, (40,))[40], labels) < 0.65

    def test_the_tally_is_balanced_accuracy(self, generator):
        labels = np.arange(240) < 60
        task = task_of(labels, np.array([f"g{i % 30}" for i in range(240)]))
        right = generator.random(240) < 0.7
        sums = probing.tally(task, 2, right)
        assert sums["mass"].sum() == pytest.approx(1)
        assert sums["right"].sum() == pytest.approx(balanced(right, labels))
        assert sums.columns == ["task", "k", "group", "mass", "right"]

    def test_shuffled_labels_stay_whole_within_a_document(self, sample):
        even = (pl.col("document") % 2 == 0).alias("source")
        empty = [pl.lit(None, pl.Boolean).alias(name) for name in ("century", "postwar", "party")]
        passages = Passages(sample.table.with_columns(even, *empty), sample.starts, sample.x, sample.token)
        config = ProbeConfig(folds=3)
        (task,) = probing.tasks_of(passages, config, 0)
        mixed = probing.shuffled(task, passages, config, 3)
        by_document = pl.DataFrame({"document": sample.table["document"], "label": mixed.labels}).unique()
        assert by_document["document"].is_unique().all()
        assert (
            by_document["label"].sum() == task.labels[np.unique(sample.table["document"], return_index=True)[1]].sum()
        )
        assert not np.array_equal(mixed.labels, task.labels)

    def test_too_few_groups_are_named(self):
        with pytest.raises(InputError, match="no label has enough groups of documents for 5 folds"):
            task_of(self.labels, np.array([f"g{i % 8 // 2}" for i in range(240)]))

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("folds", 1, "`folds` must be a whole number, at least 2, not 1"),
            ("shuffles", 0, "`shuffles` must be a whole number, at least 1, not 0"),
            ("budgets", (64, 8), r"`budgets` must be a list in ascending order, not \[64, 8\]"),
            ("sparsities", (), "`sparsities` must be a list of at least one item"),
        ],
    )
    def test_misuse_is_named(self, field, value, message):
        with pytest.raises(InputError, match=message):
            ProbeConfig(**{field: value})


class TestScores:
    @pytest.fixture
    def scores(self) -> Scores:
        """Two groups of equal mass; `one` is right on (all, half) and (all, none), `fixed` on (half, half)."""
        rows = [
            ("one", 0, "a", 0.5), ("one", 0, "b", 0.25), ("one", 1, "a", 0.5), ("one", 1, "b", 0.0),
            ("fixed", 0, "a", 0.25), ("fixed", 0, "b", 0.25),
        ]  # fmt: skip
        table = pl.DataFrame(rows, schema=["representation", "seed", "group", "right"], orient="row")
        task = [pl.lit("t").alias("task"), pl.lit(1).alias("k"), pl.lit(0.5).alias("mass")]
        return Scores.of(table.with_columns(*task))

    def test_accuracy_by_seed_and_weights(self, scores):
        assert scores.accuracy("one", "t", 1, 0, np.ones(2)) == pytest.approx(0.75)
        assert scores.accuracy("one", "t", 1, 1, np.array([1.0, 3])) == pytest.approx(0.25)
        assert scores.accuracy("fixed", "t", 1, 1, np.ones(2)) == pytest.approx(0.5)
        assert scores.accuracy("one", "t", 1, 1, np.zeros(2)) == 0.5
        assert scores.difference("one", "fixed", ["t"], [1], 0, np.ones(2)) == pytest.approx(0.25)

    def test_the_interval_spans_what_resampling_groups_can_give(self, scores):
        row = scores.summary(0).row(0, named=True)
        assert row["accuracy"] == pytest.approx((0.75 + 0.5) / 2)
        assert row["low"] == pytest.approx((0.5 + 0) / 2)
        assert row["high"] == pytest.approx(1)
