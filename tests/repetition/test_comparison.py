"""Means by group, differences, shares and what is refused; figures and panels of what was compared."""

import itertools
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from matplotlib import pyplot as plt

from trimtab.errors import InputError
from trimtab.interventions import wrap
from trimtab.repetition import comparison, evaluation, figures, panels
from trimtab.repetition.comparison import HUMAN, NEEDED, UNTRAINED, Grouped, worst_difference
from trimtab.repetition.losses import accumulate
from trimtab.rl.policy import Policy


def table(values, groups=("a", "a", "b"), seeds=(0, 1)):
    """Rows from {arm: one list of values a seed}."""
    rows = [
        (arm, seeds[i], group, float(value))
        for arm, lists in values.items()
        for i, each in enumerate(lists)
        for group, value in zip(groups, each, strict=True)
    ]
    return pl.DataFrame(rows, schema=["arm", "seed", "group", "value"], orient="row")


VALUES = {HUMAN: [[0, 0, 0]], UNTRAINED: [[6, 6, 6]], "x": [[3, 3, 0], [1, 1, 4]], "y": [[4, 4, 4], [5, 5, 5]]}


def test_means_differences_and_shares_by_hand():
    found = Grouped.of(table(VALUES), "value")
    assert (found.seeds, found.groups, found.counts.tolist()) == (2, 2, [2.0, 1.0])
    assert [found.mean(arm) for arm in (HUMAN, UNTRAINED, "x", "y")] == [0, 6, 2, 4.5]
    assert [found.mean("x", seed) for seed in (0, 1)] == [2, 2]
    assert found.mean("x", 0, np.array([0.0, 1.0])) == 0
    assert found.difference("x", "y")[0] == -2.5
    assert found.removed("y", "x", UNTRAINED)[0] == pytest.approx(1.5 / 4)
    effect, low, high = found.removed("y", HUMAN, UNTRAINED)
    assert effect == pytest.approx(0.25)
    assert low < effect < high
    assert found.removed("x", UNTRAINED, UNTRAINED) == (0.0, -np.inf, np.inf)  # of nothing there are no shares
    assert found.difference(UNTRAINED, HUMAN) == (6, 6, 6)


def test_perplexity_is_of_the_mean_over_tokens():
    rows = table({UNTRAINED: [[10, 20, 60]], "x": [[11, 22, 66], [11, 22, 66]]}).with_columns(tokens=pl.lit(10))
    found = Grouped.of(rows, "value", "tokens")
    assert found.mean(UNTRAINED) == pytest.approx(3.0)
    assert found.relative("x", UNTRAINED)[0] == pytest.approx(np.exp(0.3) - 1)
    shown = comparison.perplexity_table({"d": found})
    assert shown.filter(pl.col("arm") == "x")["change_percent"][0] == pytest.approx(100 * (np.exp(0.3) - 1))


def test_the_order_of_rows_does_not_matter():
    rows = table(VALUES)
    arms = rows["arm"].unique(maintain_order=True)
    mixed = rows.sample(fraction=1.0, shuffle=True, seed=1).sort(pl.col("arm").cast(pl.Enum(arms)), maintain_order=True)
    one, other = Grouped.of(rows, "value"), Grouped.of(mixed, "value")
    assert all((one.sums[arm] == other.sums[arm]).all() for arm in arms)


def test_other_texts_or_seeds_are_refused():
    rows = table(VALUES)
    with pytest.raises(InputError, match="y was not read with the seeds and texts"):
        Grouped.of(rows.filter((pl.col("arm") != "y") | (pl.col("group") != "b")), "value")
    three = table({UNTRAINED: [[1, 1, 1]], "x": [[1, 1, 1]] * 3}, seeds=(0, 1, 2))
    two = table({"y": [[1, 1, 1]] * 2})
    with pytest.raises(InputError, match="seeds"):
        Grouped.of(pl.concat([three, two]), "value")
    with pytest.raises(InputError, match="no arm"):
        Grouped.of(rows.filter(pl.col("arm") == "z"), "value")


def test_the_worst_decoder_decides():
    """All intervals must lie below 0: the largest effect, low and high, whichever decoder they are of."""
    one = Grouped.of(table({UNTRAINED: [[6, 6, 6]], "x": [[1, 1, 1], [5, 5, 5]], "y": [[2, 2, 2]] * 2}), "value")
    other = Grouped.of(table({UNTRAINED: [[6, 6, 6]], "x": [[2, 2, 2], [2, 2, 2]], "y": [[4, 4, 4]] * 2}), "value")
    each = [one.difference("x", "y"), other.difference("x", "y")]
    assert [effect for effect, _, _ in each] == [1, -2]
    assert worst_difference([one, other], "x", "y") == (1, -2, each[0][2])


def test_noise_of_many_decoders_does_not_refute_what_is_true_of_each():
    """Truth -0.02 in each of four: never "not held", where a maximum within the resampling said so every third time."""
    generator = np.random.default_rng(0)
    refuted = 0
    for _ in range(6):
        readings = []
        for _ in range(4):
            noise = generator.normal(0, 0.1, (2, 4, 12))
            values = {UNTRAINED: [[0.0] * 12], "x": noise[0] - 0.02, "y": noise[1]}
            rows = table(values, groups=list("abcdefghijkl"), seeds=(0, 1, 2, 3))
            readings.append(Grouped.of(rows, "value"))
        refuted += worst_difference(readings, "x", "y")[1] > 0
    assert refuted == 0


def test_magnitudes():
    assert comparison.magnitude((0.2, 0.1, 0.3)) == (0.2, 0.1, 0.3)
    assert comparison.magnitude((-0.2, -0.3, -0.1)) == (0.2, 0.1, 0.3)
    assert comparison.magnitude((0.1, -0.3, 0.5)) == (0.1, 0.0, 0.5)


def test_arms_that_a_claim_needs_are_asked_for():
    comparison.check_arms([*NEEDED, "implicit-lora-8", "policy"])
    with pytest.raises(InputError, match="unlikelihood is missing"):
        comparison.check_arms([arm for arm in NEEDED if arm != "unlikelihood"])
    with pytest.raises(InputError, match="not an arm"):
        comparison.check_arms([*NEEDED, "luck"])


@pytest.fixture(scope="module")
def texts():
    """Continuations of 6 prefixes by three arms and people; the untrained one loops."""
    generator = torch.Generator().manual_seed(0)
    prefixes = torch.randint(2, 200, (6, 8), generator=generator)
    rows = []
    for arm, decoder, seed in [
        (HUMAN, HUMAN, 0), (UNTRAINED, "greedy", 0), (UNTRAINED, "dry", 0), ("implicit", "greedy", 0),
        ("implicit", "greedy", 1), ("implicit", "nucleus-0.9", 0), ("implicit", "nucleus-0.9", 1),
    ]:  # fmt: skip
        for i, prefix in enumerate(prefixes.tolist()):
            tokens = torch.randint(2, 200, (12,), generator=generator).tolist()
            if (arm, decoder) == (UNTRAINED, "greedy"):
                tokens = tokens[:3] * 4
            rows.append(("wikipedia", arm, decoder, seed, i, f"g{i // 2}", f"doc{i}", prefix, tokens))
    columns = ["domain", "arm", "decoder", "seed", "text", "group", "document", "prefix", "tokens"]
    return pl.DataFrame(rows, schema=columns, orient="row")


def test_what_is_scored(texts):
    chosen = comparison.to_score(texts, "wikipedia", ["greedy", "nucleus-0.9"])
    assert chosen.select("arm", "decoder", "seed").unique(maintain_order=True).rows() == [
        (HUMAN, HUMAN, 0), (UNTRAINED, "greedy", 0), (UNTRAINED, "dry", 0), ("implicit", "greedy", 0),
        ("implicit", "greedy", 1), ("implicit", "nucleus-0.9", 0), ("implicit", "nucleus-0.9", 1),
    ]  # fmt: skip
    assert len(comparison.to_score(texts, "wikipedia", ["greedy"])) == 5 * 6  # what decoding alone can do stays
    once = comparison.to_score(texts, "wikipedia", ["nucleus-0.9"], ["greedy"])
    assert once.select("arm", "decoder", "seed").unique(maintain_order=True).rows() == [
        (HUMAN, HUMAN, 0), (UNTRAINED, "greedy", 0), (UNTRAINED, "dry", 0), ("implicit", "greedy", 0),
        ("implicit", "nucleus-0.9", 0), ("implicit", "nucleus-0.9", 1),
    ]  # fmt: skip


def test_a_decoder_is_read_and_scored_on_the_prefixes_that_it_was_given(texts):
    fewer = texts.filter((pl.col("decoder") != "nucleus-0.9") | (pl.col("text") < 3))
    numbered = fewer.with_columns(number=pl.col("text").cast(pl.Float64))
    readings = comparison.by_decoder(numbered, "wikipedia", ["greedy", "nucleus-0.9"], "number")
    assert readings["greedy"].mean(HUMAN) == 2.5
    assert readings["nucleus-0.9"].mean(HUMAN) == readings["nucleus-0.9"].mean("implicit") == 1.0
    scored = comparison.to_score(fewer, "wikipedia", ["nucleus-0.9"], ["greedy"])
    assert set(scored["text"]) == {0, 1, 2}


def embed(texts):
    """As an encoder whose vectors count a text's bytes."""
    counts = torch.zeros(len(texts), 256)
    for i, text in enumerate(texts):
        for byte in text.encode():
            counts[i, byte] += 1
    return torch.nn.functional.normalize(counts, dim=1)


@pytest.fixture(scope="module")
def judge(tiny_llama, tokenizer):
    return evaluation.Judge(Policy(wrap(tiny_llama, tokenizer), {}), embed, tokenizer, clusters=3)


def test_scores_are_those_of_each_text_after_its_prefix(judge, texts, tiny_llama):
    some = comparison.to_score(texts, "wikipedia", ["greedy"])
    scored = judge.scored(some)
    assert scored.drop("string", "nats", "coherence", "copied").equals(some)
    for row in scored.sample(5, seed=0).iter_rows(named=True):
        ids = torch.tensor([row["prefix"] + row["tokens"]])
        log_p = accumulate(judge.base, ids, len(row["prefix"]), None)[1]
        assert row["nats"] == pytest.approx(-log_p.mean().item(), rel=1e-5)
        logits = tiny_llama(ids).logits[0].log_softmax(1)
        alone = -logits[range(7, 19), row["tokens"]].mean()
        assert row["nats"] == pytest.approx(alone.item(), rel=1e-4)
        assert row["string"] == judge.tokenizer.decode(row["tokens"])


def test_more_clusters_than_texts_are_refused_before_anything_is_scored(judge, texts):
    few = replace(judge, clusters=7, embed=lambda _: pytest.fail("scored all the same"))
    with pytest.raises(InputError, match=r"at most 6, .* not 7"):
        few.scored(comparison.to_score(texts, "wikipedia", ["greedy"]))


def test_sets_are_summed_up_and_controls_made(judge, texts):
    scored = judge.scored(comparison.to_score(texts, "wikipedia", ["greedy"]))
    people = scored.filter(pl.col("arm") == HUMAN)
    summary = judge.summary(scored, people)
    loops = summary.filter((pl.col("arm") == UNTRAINED) & (pl.col("decoder") == "greedy"))
    assert loops["seq_rep_4"][0] == pytest.approx(6 / 9)  # 3 tokens four times: 9 4-grams, 3 of them different
    assert loops["loops"][0] == 1.0
    assert "repetitive" in loops["rejected_by"][0]
    one, other = evaluation.halves(people)
    assert set(one["text"]) == {0, 2, 4}
    assert set(other["text"]) == {1, 3, 5}
    assert judge.summary(one, other)["rejected_by"].to_list() == [""]
    fakes = evaluation.controls(people, 200, seed=0)
    made = {arm: torch.tensor(rows["tokens"].to_list()) for (arm,), rows in fakes.group_by("arm")}
    assert set(made) == set(evaluation.CONTROLS)
    assert torch.equal(made["a loop"][:, 8:], made["a loop"][:, :4])
    prefixes = torch.tensor(people["prefix"].to_list())
    assert torch.equal(made["a copied prefix"], torch.cat([prefixes, prefixes[:, :4]], dim=1))
    assert made["random tokens"].unique().numel() > 40
    shown = panels.quality_table(summary)
    assert shown.select("arm", "decoder").is_duplicated().sum() == 0


def test_generations_stand_side_by_side_marked_and_escaped(texts, tokenizer):
    hostile = tokenizer("<script>x</script>")["input_ids"][:12]
    rows = texts.with_columns(
        tokens=pl.when((pl.col("arm") == "implicit") & (pl.col("text") == 0))
        .then(pl.lit(hostile, pl.List(pl.Int64)))
        .otherwise("tokens")
    )
    page = panels.generations(rows, "wikipedia", tokenizer, arms=[HUMAN, UNTRAINED, "implicit"], shown=2)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<tr>") == 1 + 2 * 2
    assert page.count("background-color: rgba(230, 159, 0") >= 2


def test_figures_show_every_arm(texts):
    arms = [*NEEDED, *(f"implicit-lora-{rank}" for rank in range(1, 9))]  # more than there are colours
    values = {arm: [[0.3, 0.2, 0.4]] * (1 if arm in (HUMAN, UNTRAINED) else 2) for arm in (HUMAN, *arms)}
    found = Grouped.of(table(values), "value")
    _, axes = plt.subplots(1, 6)
    figures.plot_repetition(axes[0], found)
    figures.plot_trade(axes[1], found, Grouped.of(table(values).filter(pl.col("arm") != HUMAN), "value"))
    once = Grouped.of(table({arm: each[:1] for arm, each in values.items()}), "value")
    figures.plot_decoders(axes[2], {"greedy": found, "beam-4": once}, arms)
    sentences = [(arm, 0, s, r, 0.1 * r) for arm in arms for s, r in itertools.product(range(2), range(1, 4))]
    schema = ["arm", "seed", "sentence", "repeat", "probability"]
    figures.plot_sentences(axes[3], pl.DataFrame(sentences, schema=schema, orient="row"))
    figures.plot_lengths(list(axes[4:]), {"greedy": [3, 4, 12], HUMAN: [1, 2, 2]})
    assert [label.get_text() for label in axes[0].get_yticklabels()] == arms
    named = {text.get_text() for text in axes[1].get_legend().get_texts()}
    assert named == set(arms)
    assert len(axes[2].patches) == 2 * len(arms)
    assert len(axes[3].get_lines()) == len(arms)
    assert all(axis.get_xlabel() for axis in (axes[0], axes[1], axes[3], axes[4]))
    plt.close("all")
