"""Self-reinforcement by hand, and pages: what is marked, and that no text can be anything but text in them."""

import math

import pytest
import torch

from tests.pages import HOSTILE, Reader
from trimtab.errors import InputError
from trimtab.repetition.loops import highlighted, sentence_probability, side_by_side


def test_probability_by_repeat_is_over_the_same_tokens_each_time():
    asked = []

    def nats_of(ids):
        asked.append(ids)
        return torch.arange(1, len(ids), dtype=torch.float32) / 10  # the token at place t has t / 10 nats

    found = sentence_probability(nats_of, [[4, 5, 6], [7, 8]], 3)
    assert asked == [[4, 5, 6] * 3, [7, 8] * 3]
    # Places 1 2 | 4 5 | 7 8, the sentence's first token left out; then 1 | 3 | 5.
    means = [[0.15, 0.45, 0.75], [0.1, 0.3, 0.5]]
    assert found.tolist() == [pytest.approx([math.exp(-nats) for nats in row]) for row in means]


def test_a_model_that_has_learnt_to_copy_shows_it():
    def nats_of(ids):
        return torch.tensor([0.1 if ids[t - 1 : t + 1] in pairs(ids[:t]) else 2.0 for t in range(1, len(ids))])

    def pairs(ids):
        return [ids[i : i + 2] for i in range(len(ids) - 1)]

    (row,) = sentence_probability(nats_of, [[1, 2, 3, 4]], 4).tolist()
    assert row == pytest.approx([math.exp(-2.0), *[math.exp(-0.1)] * 3])


def test_sentences_have_two_tokens_and_repeats_are_some():
    for sentences, repeats in (([[1]], 2), ([[1, 2]], 0)):
        with pytest.raises(InputError, match="at least"):
            sentence_probability(lambda ids: torch.zeros(len(ids) - 1), sentences, repeats)
    assert sentence_probability(lambda ids: torch.zeros(len(ids) - 1), [], 2).shape == (0, 2)


def test_what_is_repeated_is_marked_in_one_stretch():
    reader = Reader(highlighted(["a", " b", " c", "\n", "d"], [False, True, True, False, True]))
    assert reader.text == "a b c↵d"
    assert reader.marked == [" b c", "d"]
    assert highlighted([], []) == ""
    with pytest.raises(ValueError, match="shorter"):
        highlighted(["a"], [])


def test_arms_stand_side_by_side_below_their_prefix():
    table = side_by_side(
        ["first", "second"],
        {"MLE": [(["x", "y"], [False, True]), (["z"], [False])], "iUT": [(["u"], [False]), (["v"], [True])]},
    )
    reader = Reader(table)
    assert reader.text == "MLEiUTfirstxyusecondzv"
    assert reader.marked == ["y", "v"]
    assert [tag for tag, _ in reader.tags].count("tr") == 5
    assert [attributes.get("colspan") for tag, attributes in reader.tags if tag == "td"] == ["2", None, None] * 2


def test_a_table_keeps_text_text_sets_no_colour_and_fetches_nothing():
    source = side_by_side([HOSTILE], {HOSTILE: [([HOSTILE, HOSTILE], [True, False])]})
    reader = Reader(source)
    assert {tag for tag, _ in reader.tags} == {"table", "thead", "tbody", "tr", "th", "td", "span"}
    assert reader.text.count('<script>alert("1")</script>') == 4
    assert not set(source) & set("\x1b\u202e\n")
    assert "url(" not in source
    assert "://" not in source
    for _, attributes in reader.tags:
        assert set(attributes) <= {"style", "colspan", "dir"}
        declared = dict(part.split(":") for part in attributes.get("style", "").split("; ") if part)
        assert "color" not in declared
        assert declared.get("background-color", " rgba(").startswith(" rgba(")


def test_every_arm_has_a_text_for_every_prefix():
    with pytest.raises(InputError, match="iUT has 0 texts for 1 prefixes"):
        side_by_side(["a"], {"iUT": []})
