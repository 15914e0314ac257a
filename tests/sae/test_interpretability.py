"""The example-embedding score: by hand, on planted latents, and on latents that must score as chance does."""

import dataclasses

import numpy as np
import polars as pl
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from trimtab.activations import ActivationCache
from trimtab.embeddings import SentenceEncoder
from trimtab.errors import InputError
from trimtab.sae.contexts import Contexts
from trimtab.sae.interpretability import (
    NEGATIVES,
    InterpretConfig,
    Pool,
    ScoreTensor,
    example_score,
    highlight,
    neurons,
    random_directions,
    score_latents,
)

LETTERS, WINDOWS, WINDOW = 20, 500, 8
ARMS = ("topk-4", "hierarchical-4")
CONFIG = InterpretConfig(arms=ARMS, seeds=(0,), buckets=(2, 4), latents=100, examples=10, pool=400, window=WINDOW)


@pytest.fixture(scope="module")
def encoder():
    """A random BERT that reads characters: alike are texts that share them, the marks < and > included."""
    torch.manual_seed(0)
    characters = ["[PAD]", "[UNK]", *"abcdefghijklmnopqrst<>"]
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=len(characters), initializer_range=0.5, **sizes))
    return SentenceEncoder(model.eval(), tokenizer)


def planted(fires, ranks, tokens):
    """Contexts from dense arrays `[latents, rows]`: which latent fires where, at which rank (its value is 1 / rank)."""
    latents, rows = np.nonzero(fires)
    place = np.arange(len(tokens))
    return Contexts(
        k=4, window=WINDOW, document=place // 100, position=place % 100, token=tokens,
        starts=np.arange(0, len(tokens) + 1, WINDOW), pointers=np.searchsorted(latents, np.arange(len(fires) + 1)),
        rows=rows, values=(1 / ranks[latents, rows]).astype(np.float32), ranks=ranks[latents, rows],
    )  # fmt: skip


@pytest.fixture(scope="module")
def letters(tokenizer):
    """Windows of two letters each, in random order; five latents fire on each letter, at random ranks."""
    generator = np.random.default_rng(0)
    pairs = generator.integers(LETTERS, size=(WINDOWS, 2))
    spoken = np.take_along_axis(pairs, generator.integers(2, size=(WINDOWS, WINDOW)), axis=1).flatten()
    ids = np.array([tokenizer(chr(97 + i))["input_ids"][-1] for i in range(LETTERS)])
    fires = spoken[None] == np.repeat(np.arange(LETTERS), 5)[:, None]
    return planted(fires, generator.integers(1, 5, size=fires.shape), ids[spoken])


@pytest.fixture(scope="module")
def marks_only(letters):
    """Latents that fire on nothing in particular, but on seven of a window's eight tokens where they do."""
    generator = np.random.default_rng(1)
    windows = np.repeat(generator.random((100, WINDOWS)) < 0.2, WINDOW, axis=1)
    fires = windows & (generator.random((100, WINDOWS * WINDOW)) < 7 / 8)
    return planted(fires, np.ones(fires.shape, np.int64), letters.token)


def test_runs_of_marked_tokens_are_put_between_marks(tokenizer):
    tokens = np.array(tokenizer("the cat sat", add_special_tokens=False)["input_ids"])
    text = "the cat sat"
    assert len(tokens) == len(text), "one token a character here"
    marks = np.zeros(len(text), bool)
    assert highlight(tokens, marks, tokenizer) == text
    marks[[0, 3, 4, 5]] = True
    assert highlight(tokens, marks, tokenizer) == "<<t>>he <<ca>>t sat"
    assert highlight(tokens, ~marks, tokenizer) == "t<<he>> ca<<t sat>>"


def test_the_score_equals_a_naive_calculation():
    generator = torch.Generator().manual_seed(0)
    positives, negatives = (
        torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1) for shape in ((5, 7), (5, 3, 7))
    )
    wins, gaps = [], []
    for i in range(5):
        others = [j for j in range(5) if j != i]

        def score(query, others=others):
            to_positives = np.mean([float(query @ positives[j]) for j in others])
            to_negatives = np.mean([float(query @ negatives[j, r]) for j in others for r in range(3)])
            return to_positives - to_negatives

        for r in range(3):
            gaps.append(score(positives[i]) - score(negatives[i, r]))
            wins.append(gaps[-1] > 0)
    assert example_score(positives, negatives) == pytest.approx((np.mean(wins), np.mean(gaps)), rel=1e-4)


def test_the_score_of_clear_cases():
    east, north = torch.eye(2)
    assert example_score(east.expand(4, 2), north.expand(4, 3, 2)) == pytest.approx((1.0, 2.0))
    assert example_score(east.expand(4, 2), east.expand(4, 3, 2)) == pytest.approx((0.5, 0.0))


def test_negatives_are_silent_have_as_many_marks_and_serve_once(letters, tokenizer, encoder):
    generator = np.random.default_rng(0)
    pool = Pool.embed(letters, 400, tokenizer, encoder, generator)
    assert len(np.unique(pool.windows)) == len(pool.vectors) == 400
    assert pool.marks.min() == 1
    assert pool.marks.max() == WINDOW
    active = letters.active(3).windows
    silent = pool.silent(active)
    assert set(pool.windows[silent]) == set(pool.windows) - set(active)
    chosen = pool.match(silent, np.array([1, 1, 2, 7]), generator)
    assert chosen.shape == (4, NEGATIVES)
    assert len(np.unique(chosen)) == chosen.size
    assert set(chosen.flat) <= set(silent)
    assert (pool.marks[chosen[:3]] == np.array([[1], [1], [2]])).all()
    assert np.abs(pool.marks[chosen[3]] - 7).max() <= 1


def mean_auroc(contexts, pool, tokenizer, encoder, seed=0):
    scores, counts = score_latents(contexts, pool, CONFIG, tokenizer, encoder, np.random.default_rng(seed))
    assert counts["scored"].sum() == scores.height
    assert (counts["firing"] == counts["rare"] + counts["never_silent"] + counts["scorable"]).all()
    return scores["auroc"].mean(), 4 * scores["auroc"].std() / np.sqrt(scores.height)


def test_latents_that_mean_something_score_high_and_random_ones_at_chance(letters, marks_only, tokenizer, encoder):
    """The trap: windows in which latents fire bear marks. Marks alone must not raise the score, however many."""
    generator = np.random.default_rng(0)
    pool = Pool.embed(letters, 400, tokenizer, encoder, generator)
    score, error = mean_auroc(letters, pool, tokenizer, encoder)
    assert score - error > 0.6
    for control in (letters.shuffled(generator), marks_only, marks_only.shuffled(generator)):
        score, error = mean_auroc(control, pool, tokenizer, encoder)
        assert abs(score - 0.5) < error < 0.1
    # The trap does spring where negatives bear one mark each whatever the positives do.
    texts = [
        highlight(letters.token[slice(*letters.starts[w : w + 2])], np.arange(WINDOW) == 3, tokenizer)
        for w in pool.windows
    ]
    score, error = mean_auroc(marks_only, dataclasses.replace(pool, vectors=encoder.embed(texts)), tokenizer, encoder)
    assert score - error > 0.7


def test_latents_that_cannot_be_scored_are_counted(letters, tokenizer, encoder):
    pool = Pool.embed(letters, 400, tokenizer, encoder, np.random.default_rng(0))
    fires = np.zeros((5, len(letters.token)), bool)
    fires[0] = True  # never silent
    fires[1, : 3 * WINDOW] = True  # rare
    fires[2, : 40 * WINDOW] = True
    fires[3, 0] = True  # rare
    contexts = planted(fires, np.ones(fires.shape, np.int64), letters.token)
    scores, counts = score_latents(contexts, pool, CONFIG, tokenizer, encoder, np.random.default_rng(0))
    first = {"bucket": "1-2", "firing": 4, "rare": 2, "never_silent": 1, "scorable": 1, "scored": 1}
    assert counts.to_dicts() == [first, {"bucket": "3-4"} | dict.fromkeys(list(first)[1:], 0)]
    assert scores.select("bucket", "latent", "density", "median_rank").row(0) == ("1-2", 2, 40 / WINDOWS, 1.0)


def test_neurons_are_coordinates_in_both_signs_and_random_directions_are_unit_ones(caches):
    cache = ActivationCache(caches / "test", 0)
    raw, x = (next(cache.read(raw=kind))["x"] for kind in (True, False))
    with torch.no_grad():
        values, indices = neurons(cache, 5).encode(raw, 5)
        expected, places = torch.cat([x, -x], dim=1).topk(5, dim=1)
        torch.testing.assert_close(values * cache.statistics.scale, expected, rtol=1e-3, atol=1e-3)
        assert (indices == places).float().mean() > 0.99
        made = random_directions(cache, 30, 5, seed=1)
        torch.testing.assert_close(made.W_dec.norm(dim=1), torch.ones(30))
        expected = (x @ made.W_enc.T).relu().topk(5, dim=1).values
        torch.testing.assert_close(made.encode(raw, 5).values * cache.statistics.scale, expected, rtol=1e-3, atol=1e-3)


def test_differences_by_hand():
    hierarchical, topk = "hierarchical-64", "topk-64"
    config = InterpretConfig(arms=(topk, hierarchical), seeds=(0, 1), buckets=(8, 64), latents=2, examples=2, pool=12)
    table = {
        (hierarchical, 0): ([0.9, 0.7], [0.6]), (hierarchical, 1): ([0.8, 0.8], [0.5, 0.7]),
        (topk, 0): ([0.7, 0.7], [0.5, 0.6]), (topk, 1): ([1.0, 1.0], [0.5, 0.5]),
        ("control", 0): ([0.6, 0.4], []),
    }  # fmt: skip
    rows = [
        (*key, bucket, value)
        for key, both in table.items()
        for bucket, values in zip(config.ranks(), both, strict=True)
        for value in values
    ]
    scores = ScoreTensor.of(pl.DataFrame(rows, ["subject", "seed", "bucket", "auroc"], orient="row"), config)
    ones, first = np.ones(2), np.array([2.0, 0.0])
    assert scores.mean(hierarchical, 0, ones) == pytest.approx([0.8, 0.6])
    assert scores.mean(hierarchical, 0, ones - first / 2) == pytest.approx([0.7, 0.6]), "a bucket with nothing drawn"
    np.testing.assert_array_equal(scores.mean("control", 0, ones), [0.5, np.nan])
    assert scores.least_difference(hierarchical, [topk], 0, ones) == pytest.approx(0.05)
    assert scores.least_difference(hierarchical, [topk], 1, ones) == pytest.approx(-0.2)
    assert scores.least_difference(hierarchical, [topk], 0, first) == pytest.approx(0.1)
    # The control has one seed, which stands for all, and nothing to score in the second bucket.
    assert scores.least_difference(hierarchical, ["control"], 1, ones) == pytest.approx(0.3)
    assert scores.least_difference(hierarchical, ["control", topk], 0, ones) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": ()}, "`seeds` must be a list of at least one item"),
        ({"seeds": (1, 1)}, "each of them once"),
        ({"buckets": (8, 8)}, r"`buckets` must be a list .*, each of them once"),
        ({"buckets": (0, 8)}, "`buckets` must be a list of whole numbers of at least 1"),
        ({"arms": ("topk-64",)}, "`arms` must be hierarchical-64 and topk-64, as `buckets` ends at 64"),
        ({"buckets": (8, 32)}, "`arms` must be hierarchical-32 and topk-32"),
        ({"examples": 1}, "`examples` must be a whole number, at least 2, not 1"),
        ({"window": 1}, "`window` must be a whole number, at least 2, not 1"),
        ({"pool": 95}, "`pool` must be at least 6 times `examples`, which is 96, not 95"),
        ({"encoder_dtype": "int8"}, "`encoder_dtype` must be one of float32, bfloat16, float16, not 'int8'"),
    ],
)
def test_bad_configurations_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        InterpretConfig(**changes)


def test_buckets_have_names():
    assert InterpretConfig().ranks() == {"1-8": (1, 8), "9-32": (9, 32), "33-64": (33, 64)}
    assert InterpretConfig().k == 64
