"""Held-out errors against decoding each budget on its own."""

import dataclasses

import numpy as np
import polars as pl
import pytest
import torch

from trimtab.activations import ActivationCache
from trimtab.errors import InputError
from trimtab.sae import SAE, Arm, comparison, squared_errors
from trimtab.sae.evaluation import calibrate, pca_fvu, principal_components, threshold_reading, weighted_fvu

BUDGETS = [1, 3, 10]


@pytest.fixture(scope="module")
def setting(caches):
    cache = ActivationCache(caches / "test", 1)
    norms = torch.cat([shard.get_tensor("norms")[:, 1] for shard in cache.shards])
    bar = float(norms.quantile(0.9))  # the tiny model has no outliers of its own
    cache.statistics = dataclasses.replace(cache.statistics, threshold=bar, kept=int((norms <= bar).sum()))
    sae = SAE(cache.d_model, 50, 10, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_dec.normal_(0, 0.2)
    chunks = list(cache.read(outliers=True))
    return cache, sae, {key: torch.cat([chunk[key] for chunk in chunks]) for key in ("x", "document", "kept")}


def test_every_measure_equals_a_naive_reading(setting):
    cache, sae, rows = setting
    sae.requires_grad_(False)
    result = squared_errors(sae, cache, BUDGETS)
    kept = rows["kept"]
    assert 0 < (~kept).sum() < len(kept) / 4, "no outlier: the columns with and without are the same"
    for k in BUDGETS:
        latents = sae.encode(rows["x"], k)
        x_hat = sae.decode(latents)
        errors, totals = (x_hat - rows["x"]).square().sum(1).double(), rows["x"].square().sum(1).double()
        assert result.fvu()[k] == pytest.approx(float(errors[kept].sum() / totals[kept].sum()), rel=1e-5)
        assert result.fvu(outliers=True)[k] == pytest.approx(float(errors.sum() / totals.sum()), rel=1e-5)
        cosines = torch.nn.functional.cosine_similarity(x_hat, rows["x"])
        assert result.cosine()[k] == pytest.approx(float(cosines[kept].mean()), rel=1e-4)
        active = (latents.values > 0) & kept[:, None]
        assert result.l0()[k] == pytest.approx(float(active.sum() / kept.sum()))
        density = torch.stack([((latents.indices == i) & active).any(1).sum() for i in range(50)]) / kept.sum()
        torch.testing.assert_close(result.density[k], density)
        assert result.alive()[k] == float((density > 0).float().mean())
        assert result.dense()[k] == float((density > 0.1).float().mean())
        for document in rows["document"].unique().tolist():
            mine = (rows["document"] == document) & kept
            row = result.table.filter((pl.col("k") == k) & (pl.col("document") == document)).row(0, named=True)
            assert row["error"] == pytest.approx(float(errors[mine].sum()), rel=1e-4)
            assert row["rows"] == int(mine.sum())


def test_weighted_fvu_is_the_weighted_mean_of_readings(setting):
    cache, sae, _ = setting
    fvu = squared_errors(sae, cache, BUDGETS).fvu()
    wanted = (2 * fvu[1] + fvu[3] + 5 * fvu[10]) / 8
    assert weighted_fvu(sae, cache, {1: 2.0, 3: 1.0, 10: 5.0}) == pytest.approx(wanted, rel=1e-5)


def test_thresholds_let_k_latents_fire_on_average(setting):
    cache, sae, rows = setting
    sae.requires_grad_(False)
    sae.thresholds = calibrate(sae, cache, BUDGETS)
    x = rows["x"][rows["kept"]]
    reading = threshold_reading(sae, cache, [1, 3])
    for k in (1, 3):
        pre = x @ sae.W_enc.T + sae.b_enc
        active = pre > sae.thresholds[k]
        assert float(active.sum() / len(x)) == pytest.approx(k, rel=0.01)
        x_hat = torch.where(active, pre, 0) @ sae.W_dec + sae.b_dec
        fvu = float((x - x_hat).square().sum() / x.square().sum())
        assert reading[k] == pytest.approx((float(active.sum() / len(x)), fvu), rel=1e-4)


def test_pca_equals_a_singular_value_decomposition(setting):
    cache, _, rows = setting
    x = rows["x"][rows["kept"]].double()
    values = torch.linalg.svdvals(x).square()
    fvu = pca_fvu(principal_components(cache), cache, [1, 3, 16, 20])
    for k in (1, 3):
        assert fvu[k] == pytest.approx(float(values[k:].sum() / values.sum()), rel=1e-4)
    assert abs(fvu[16]) < 1e-5, "all components explain everything"
    assert fvu[20] == fvu[16]


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
    both = {2: [TWO, FOUR], 4: [TWO, FOUR]}
    assert pairs.worst_excess(HIER, both, 0, ones) == pytest.approx(10 / 5 - 1)
    assert pairs.worst_excess(HIER, {4: [TWO, FOUR]}, 1, ones) == pytest.approx(7 / 6 - 1)
    assert pairs.worst_excess(HIER, {4: [FOUR]}, 0, ones) == pytest.approx(10 / 6 - 1)
    assert pairs.worst_excess(HIER, both, 1, first_group) == pytest.approx(0)
    assert pairs.least_excess(FOUR, HIER, [2], 0, ones) == pytest.approx(6 / 10 - 1)
    assert pairs.excess((FOUR, 4), (HIER, 2), 0, ones) == pytest.approx(6 / 20 - 1)


def test_a_margin_that_grows_grows_at_every_halving():
    errors = pl.DataFrame(
        [(arm, 0, k, 0, error, 9.0) for arm, row in {"topk-4": (5, 3, 1), "hierarchical-4": (2, 2, 1)}.items()
         for k, error in zip((1, 2, 4), map(float, row), strict=True)],
        schema=["arm", "seed", "k", "document", "error", "total"], orient="row",
    )  # fmt: skip
    pairs = comparison.ErrorTensor.of(errors, DOCUMENTS)
    # Margins at k = 1, 2, 4: 1.5, 0.5, 0.
    assert pairs.least_growth(FOUR, HIER, [1, 2, 4], 0, np.ones(1)) == pytest.approx(0.5)
    assert pairs.least_growth(FOUR, HIER, [4, 1], 0, np.ones(1)) == pytest.approx(1.5)


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


@pytest.mark.parametrize(
    "arms",
    [
        ["topk-8"],
        ["hierarchical-8"],
        ["topk-8", "hierarchical-8", "hierarchical-16"],
        ["topk-8", "hierarchical-4"],
        ["topk-4", "hierarchical-8"],
    ],
)
def test_a_comparison_has_two_sides(arms):
    with pytest.raises(InputError, match="one hierarchical-K, topk-K for the same K"):
        comparison.Sides.of(arms)


def test_arms_find_their_part_in_a_comparison():
    sides = comparison.Sides.of(["topk-8", "hierarchical-8", "batchtopk-8", "topk-2", "hierarchical-pow2-8"])
    assert sides.hierarchical == Arm("hierarchical", 8)
    assert sides.single == (TWO, Arm("topk", 8))
    assert sides.truncated == Arm("topk", 8)
    assert sides.other("hierarchical-pow2") == Arm("hierarchical-pow2", 8)
    assert sides.others == (Arm("batchtopk", 8), Arm("hierarchical-pow2", 8))
    assert sides.other("hierarchical-pow2gap") is None
