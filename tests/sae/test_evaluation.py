"""Held-out errors against decoding each budget on its own."""

import numpy as np
import polars as pl
import pytest
import torch

from trimtab.activations import ActivationCache
from trimtab.errors import InputError
from trimtab.sae import SAE, Arm, comparison, squared_errors

BUDGETS = [1, 3, 10]


@pytest.fixture(scope="module")
def setting(caches):
    cache = ActivationCache(caches / "test", 1)
    sae = SAE(cache.d_model, 50, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_dec.normal_(0, 0.2)
    chunks = list(cache.read())
    return cache, sae, {key: torch.cat([chunk[key] for chunk in chunks]) for key in ("x", "document")}


def test_errors_and_alive_shares_equal_a_naive_reading(setting):
    cache, sae, rows = setting
    sae.requires_grad_(False)
    result = squared_errors(sae, cache, BUDGETS)
    for k in BUDGETS:
        latents = sae.encode(rows["x"], k)
        errors = (sae.decode(latents) - rows["x"]).square().sum(1).double()
        assert result.fvu()[k] == pytest.approx(float(errors.sum() / rows["x"].double().square().sum()), rel=1e-5)
        for document in rows["document"].unique().tolist():
            mine = rows["document"] == document
            row = result.table.filter((pl.col("k") == k) & (pl.col("document") == document)).row(0, named=True)
            assert row["error"] == pytest.approx(float(errors[mine].sum()), rel=1e-4)
            assert row["rows"] == int(mine.sum())
        assert result.alive[k] == len(latents.indices[latents.values > 0].unique()) / 50


def test_shuffled_ranks_agree_only_where_all_are_read(setting):
    cache, sae, _ = setting
    ranked, shuffled = (squared_errors(sae, cache, BUDGETS, shuffle_ranks=seed).fvu() for seed in (None, 0))
    assert shuffled[10] == pytest.approx(ranked[10], rel=1e-5)
    assert shuffled[1] > ranked[1] * 1.05 or shuffled[3] > ranked[3] * 1.05


def errors_table():
    """Three arms, two seeds, three documents of two groups; numbers chosen for a calculation by hand."""
    values = {
        ("topk-4", 0): [1, 3, 2], ("topk-4", 1): [2, 2, 2],
        ("topk-2", 0): [1, 2, 2], ("topk-2", 1): [4, 4, 4],
        ("hierarchical-4", 0): [2, 4, 4], ("hierarchical-4", 1): [2, 2, 3],
    }  # fmt: skip
    rows = [
        (arm, seed, k, document, float(error) * (4 / k), 20.0)
        for (arm, seed), errors in values.items()
        for k in (2, 4)
        for document, error in enumerate(errors)
    ]
    return pl.DataFrame(rows, schema=["arm", "seed", "k", "document", "error", "total"], orient="row")


DOCUMENTS = pl.DataFrame({"document": [0, 1, 2], "source": ["s"] * 3, "group": ["a", "b", "b"]})
HIER, TWO, FOUR = Arm("hierarchical", 4), Arm("topk", 2), Arm("topk", 4)


def test_the_front_is_the_best_topk_arm_at_each_k_by_hand():
    pairs = comparison.ErrorTensor.of(errors_table(), DOCUMENTS)
    assert (pairs.seeds, pairs.groups) == (2, 2)
    ones, first_group = np.ones(2), np.array([2.0, 0.0])
    # Seed 0: hierarchical 10, topk-4 6, topk-2 5 (the best, though it was not trained for k = 4).
    assert pairs.above_front(HIER, [TWO, FOUR], [2, 4], 0, ones) == pytest.approx(10 / 5 - 1)
    assert pairs.above_front(HIER, [TWO, FOUR], [4], 1, ones) == pytest.approx(7 / 6 - 1)
    assert pairs.above_front(HIER, [TWO, FOUR], [2, 4], 1, first_group) == pytest.approx(0)
    assert pairs.least_loss(FOUR, HIER, [2], 0, ones) == pytest.approx(6 / 10 - 1)


def test_tables_and_alive_differences_by_hand():
    table = comparison.fvu_table(errors_table()).filter((pl.col("arm") == "topk-4") & (pl.col("k") == 4))
    row = table.row(0, named=True)
    assert (row["fvu"], row["low"], row["high"]) == pytest.approx((0.1, 0.1, 0.1))
    rows = [("topk-4", 0, 4, 0.5), ("topk-4", 1, 4, 0.7), ("hierarchical-4", 0, 4, 0.8), ("hierarchical-4", 1, 4, 0.6)]
    alive = pl.DataFrame(rows, schema=["arm", "seed", "k", "alive"], orient="row")
    assert comparison.alive_difference(alive, HIER, FOUR) == pytest.approx([0.3, -0.1])


def test_missing_arms_seeds_and_documents_are_named(tmp_path):
    with pytest.raises(InputError, match=r"topk-4 holds no errors\.parquet: run `dvc repro sae@topk-4`"):
        comparison.read_errors(tmp_path, ["topk-4"])
    for column, value in (("document", 1), ("seed", 1)):
        lacking = errors_table().filter(~((pl.col("arm") == "topk-4") & (pl.col(column) == value)))
        with pytest.raises(InputError, match="was not read with the seeds and documents of the others"):
            comparison.ErrorTensor.of(lacking.filter(pl.col("document") != 2), DOCUMENTS)


@pytest.mark.parametrize("arms", [["topk-8"], ["hierarchical-8"], ["topk-8", "hierarchical-8", "hierarchical-16"]])
def test_a_comparison_has_two_sides(arms):
    with pytest.raises(InputError, match="one hierarchical-K and at least one topk-K"):
        comparison.sides(arms)
    with pytest.raises(InputError, match="not trained up to the k of topk-8"):
        comparison.sides(["topk-8", "hierarchical-4"])
    assert comparison.sides(["topk-8", "hierarchical-8", "topk-2"]) == (Arm("hierarchical", 8), [TWO, Arm("topk", 8)])
