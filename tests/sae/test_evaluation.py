"""Held-out errors against decoding each budget on its own."""

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
    """Two arms, two seeds, two documents; the numbers are chosen for a calculation by hand."""
    values = {
        ("topk-4", 0): [1, 3],
        ("topk-4", 1): [2, 2],
        ("hierarchical-4", 0): [2, 4],
        ("hierarchical-4", 1): [2, 2],
    }
    rows = [(arm, seed, 4, d, e, 10.0) for (arm, seed), pair in values.items() for d, e in enumerate(map(float, pair))]
    return pl.DataFrame(rows, schema=["arm", "seed", "k", "document", "error", "total"], orient="row")


def test_ratios_and_tables_by_hand():
    pairs = comparison.ErrorTensor.of(errors_table())
    one, other = Arm("hierarchical", 4), Arm("topk", 4)
    assert (pairs.seeds, pairs.documents) == (2, 2)
    ones = torch.ones(2, 2).numpy()
    assert pairs.ratio(one, other, 4, ones) == pytest.approx(10 / 8 - 1)
    first_document_twice = torch.tensor([[2.0, 0.0], [2.0, 0.0]]).numpy()
    assert pairs.ratio(one, other, 4, first_document_twice) == pytest.approx(4 / 3 - 1)
    table = comparison.fvu_table(errors_table()).filter(pl.col("arm") == "topk-4").row(0, named=True)
    assert (table["fvu"], table["low"], table["high"]) == (0.2, 0.2, 0.2)


def test_missing_arms_and_documents_are_named(tmp_path):
    with pytest.raises(InputError, match=r"topk-4 holds no errors\.parquet: run `dvc repro sae@topk-4`"):
        comparison.read_errors(tmp_path, ["topk-4"])
    lacking = errors_table().filter(~((pl.col("arm") == "topk-4") & (pl.col("document") == 1)))
    with pytest.raises(InputError, match="topk-4 at k=4 was not read on the same documents"):
        comparison.ErrorTensor.of(lacking)
