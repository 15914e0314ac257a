"""Gaps between arms on text, by hand."""

import numpy as np
import polars as pl
import pytest

from trimtab.errors import InputError
from trimtab.rebased.text_comparison import Losses, check_arms

NATS = {"softmax": [(2.0, 30.0), (4.0, 60.0)], "rebased": [(6.0, 30.0), (8.0, 60.0)], "mid": [(4.0, 30.0), (6.0, 60.0)]}
"""By arm and document: nats of recalled predictions and of the others; documents have 2 and 4, 10 and 20 of them."""


def write(folder, arm, nats, seeds=2, counts=((2, 10), (4, 20))):
    rows = [
        (seed, document, nats[document][0] + seed, counts[document][0], nats[document][1], counts[document][1])
        for seed in range(seeds)
        for document in range(2)
    ]
    columns = ["seed", "group", "recalled_nats", "recalled", "others_nats", "others"]
    (folder / arm).mkdir()
    pl.DataFrame(rows, schema=columns, orient="row").write_parquet(folder / arm / "losses.parquet")


@pytest.fixture
def losses(tmp_path):
    for arm, nats in NATS.items():
        write(tmp_path, arm, nats)
    return Losses.read(tmp_path, list(NATS))


def test_means_and_gaps(losses):
    ones = np.ones(2)
    assert (losses.seeds, losses.groups) == (2, 2)
    assert losses.mean("softmax", "recalled", 0, ones) == pytest.approx(6 / 6)
    assert losses.mean("softmax", "recalled", 1, ones) == pytest.approx(8 / 6)
    assert losses.mean("softmax", "overall", 0, ones) == pytest.approx(96 / 36)
    assert losses.mean("softmax", "overall", 0, np.array([0.0, 1.0])) == pytest.approx(64 / 24)
    assert losses.gap("rebased", "softmax", "recalled", 0, ones) == pytest.approx(8 / 6)
    assert losses.interval("rebased", "softmax", "recalled")[0] == pytest.approx(8 / 6)
    assert losses.most_on_recalled("softmax", "rebased")[0] == pytest.approx(8 / 6), "and level on the others"
    assert losses.most_on_recalled("rebased", "softmax")[0] == pytest.approx(-8 / 6), "behind is not ahead"
    assert losses.perplexity("softmax", "others") == pytest.approx(np.exp(3))


def test_half_of_the_gap_is_closed(losses):
    effect, low, high = losses.closed("mid", "rebased", "softmax")
    assert effect == pytest.approx(0.5)
    assert low <= 0.5 <= high
    assert losses.closed("mid", "softmax", "rebased")[1:] == (-np.inf, np.inf), "softmax is no worse: there is no gap"


def test_what_cannot_be_compared_is_named(tmp_path):
    with pytest.raises(InputError, match="hybrid is missing"):
        check_arms(["softmax", "based", "rebased"])
    with pytest.raises(InputError, match="not an arm"):
        check_arms(["softmax", "mamba"])
    write(tmp_path, "softmax", NATS["softmax"])
    with pytest.raises(InputError, match="dvc repro pretrain@rebased"):
        Losses.read(tmp_path, ["softmax", "rebased"])
    write(tmp_path, "rebased", NATS["rebased"], counts=((2, 10), (4, 21)))
    with pytest.raises(InputError, match="other seeds or blocks"):
        Losses.read(tmp_path, ["softmax", "rebased"])
    for arm in ("mid", "none"):
        write(tmp_path, arm, NATS["softmax"], counts=((0, 10), (0, 20)))
    with pytest.raises(InputError, match="among the recalled"):
        Losses.read(tmp_path, ["mid", "none"])
