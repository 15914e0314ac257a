"""Splicing against a forward hook and sums written out token by token; what stays as it was; PCA; the readings."""

import math

import polars as pl
import pytest
import torch

from trimtab.activations import ActivationCache
from trimtab.corpus import Blocks
from trimtab.errors import InputError
from trimtab.interventions import wrap
from trimtab.sae import SAE
from trimtab.sae.evaluation import principal_components
from trimtab.sae.splicing import (
    Condition,
    SpliceConfig,
    baselines,
    prediction_losses,
    read_saes,
    readings,
    recovered,
    sae_conditions,
    splice_losses,
)

SITE, TOKENS = 1, 300


@pytest.fixture(scope="module")
def train(caches):
    return ActivationCache(caches / "train", SITE)


@pytest.fixture(scope="module")
def sae(train):
    fresh = SAE(train.d_model, 40, 8, generator=torch.Generator().manual_seed(1))
    return fresh.fold(train.mean, train.statistics.scale)


def read(tiny_llama, tokenizer, blocks_file, cache, conditions, *, bos):
    blocks = Blocks(blocks_file, "test", TOKENS)
    wrapped = wrap(tiny_llama, tokenizer)
    return blocks, splice_losses(wrapped, blocks, cache, conditions, batch_blocks=3, pad=1, bos=bos)


@pytest.mark.parametrize("bos", [0, None])
@pytest.mark.parametrize("outliers", [False, True])
def test_losses_equal_a_forward_hook_and_a_loop_over_tokens(
    tiny_llama, tokenizer, blocks_file, caches, sae, bos, outliers
):
    cache = ActivationCache(caches / "test", SITE)
    if outliers:  # about half of the rows then count as outliers
        object.__setattr__(cache.statistics, "threshold", cache.statistics.median_norm)
    threshold = cache.statistics.threshold
    condition = Condition("sae", "topk-8", 3, lambda x: sae.decode(sae.encode(x, 3)))
    blocks, table = read(tiny_llama, tokenizer, blocks_file, cache, [condition], bos=bos)
    left_alone = 0

    def hook(_module, _arguments, hidden):
        nonlocal left_alone
        new = hidden.clone()
        for i in range(1, hidden.shape[1]):
            if hidden[0, i].norm() <= threshold:
                new[0, i] = sae.decode(sae.encode(hidden[0, i : i + 1], 3))[0]
            else:
                left_alone += 1
        return new

    want: dict[int, list[float]] = {}
    for tokens, document in zip(blocks.dataset["tokens"], blocks.dataset["document"], strict=True):
        ids = torch.tensor([([] if bos is None else [bos]) + tokens])
        with torch.inference_mode():
            clean = tiny_llama(ids).logits[0].double().softmax(-1)
            handle = tiny_llama.model.layers[SITE].register_forward_hook(hook)
            spliced = tiny_llama(ids).logits[0].double().softmax(-1)
            handle.remove()
        sums = want.setdefault(document, [0, 0.0, 0.0])
        for i in range(1, ids.shape[1] - 1):
            sums[0] += 1
            sums[1] -= math.log(spliced[i, ids[0, i + 1]])
            sums[2] += float((clean[i] * (clean[i] / spliced[i]).log()).sum())
    assert (left_alone > 0) == outliers
    got = table.filter(pl.col("condition") == "sae").sort("document")
    assert got["document"].to_list() == sorted(want)
    for (n, ce, kl), row in zip((want[d] for d in sorted(want)), got.iter_rows(named=True), strict=True):
        assert (row["arm"], row["k"], row["tokens"]) == ("topk-8", 3, n)
        assert row["ce"] == pytest.approx(ce, rel=1e-4)
        assert row["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-4)
    assert want
    assert sum(kl for _, _, kl in want.values()) > 0.01


def test_identity_loses_nothing_and_zero_recovers_nothing(tiny_llama, tokenizer, blocks_file, caches, train, sae):
    cache = ActivationCache(caches / "test", SITE)
    identity = Condition("sae", "identity", 1, lambda x: x.clone())
    conditions = [identity, *baselines(train, [1, train.d_model]), *sae_conditions({"hierarchical-8": sae}, [1, 4])]
    _, losses = read(tiny_llama, tokenizer, blocks_file, cache, conditions, bos=0)
    table = recovered(losses)
    by = {(r["condition"], r["arm"], r["k"]): r for r in table.iter_rows(named=True)}
    assert by["sae", "identity", 1]["kl"] == pytest.approx(0, abs=1e-6)
    assert by["clean", None, None]["kl"] == 0
    assert by["pca", None, train.d_model]["kl"] == pytest.approx(0, abs=1e-5)  # every component: the identity again
    assert [by["clean", None, None][f"recovered_{name}"] for name in ("zero", "mean")] == pytest.approx([1, 1])
    assert by["zero", None, None]["recovered_zero"] == 0
    assert by["mean", None, None]["recovered_mean"] == 0
    assert ("sae", "hierarchical-8", 4) in by
    row, clean = by["pca", None, 1], by["clean", None, None]
    zero = by["zero", None, None]
    assert row["recovered_zero"] == pytest.approx((zero["ce"] - row["ce"]) / (zero["ce"] - clean["ce"]))
    assert table["tokens"].n_unique() == 1


def test_cross_entropy_and_kl_of_rows_beyond_one_chunk():
    generator = torch.Generator().manual_seed(0)
    logits, clean = (torch.randn(37, 11, generator=generator).bfloat16() for _ in range(2))
    targets = torch.randint(0, 11, (37,), generator=generator)
    ce, kl = prediction_losses(logits, clean.float().log_softmax(-1), targets)
    torch.testing.assert_close(ce, torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none"))
    pairs = (torch.distributions.Categorical(logits=each.float()) for each in (clean, logits))
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(*pairs))


def test_principal_components_are_those_of_a_singular_value_decomposition(train):
    x = torch.cat([chunk["x"] for chunk in train.read()])
    found = principal_components(train)
    _, singular, want = torch.linalg.svd(x.double(), full_matrices=False)
    assert (singular[:4].diff() < -0.1).all()
    cosines = (found[:4].double() * want[:4]).sum(dim=1).abs()
    torch.testing.assert_close(cosines, torch.ones(4, dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(found @ found.T, torch.eye(train.d_model), atol=1e-5, rtol=0)


def test_each_arm_is_read_where_it_was_trained_and_the_largest_topk_below_too():
    arms = ["topk-2", "topk-8", "hierarchical-8", "multitopk-8"]
    assert readings(arms, [1, 2, 4]) == [
        ("topk-2", 2),
        ("topk-8", 1), ("topk-8", 2), ("topk-8", 4), ("topk-8", 8),
        ("hierarchical-8", 1), ("hierarchical-8", 2), ("hierarchical-8", 4), ("hierarchical-8", 8),
        ("multitopk-8", 2), ("multitopk-8", 8),
    ]  # fmt: skip
    assert readings(["hierarchical-8"], [16]) == [("hierarchical-8", 8)]
    with pytest.raises(InputError, match="is not an arm"):
        readings(["best-8"], [1])


def test_saes_of_the_first_seed_are_read_and_must_share_a_site(tmp_path, sae):
    for arm, seed, site in (("topk-8", 10, 1), ("topk-8", 9, 1), ("hierarchical-8", 0, 1), ("topk-4", 0, 2)):
        sae.save_pretrained(tmp_path / arm / f"seed-{seed}", {"arm": arm, "site": site, "seed": seed})
    saes, site = read_saes(tmp_path, ["topk-8", "hierarchical-8"])
    assert (list(saes), site) == (["topk-8", "hierarchical-8"], 1)
    with pytest.raises(InputError, match=r"read sites \[1, 2\], not one"):
        read_saes(tmp_path, ["topk-8", "topk-4"])
    with pytest.raises(InputError, match=r"topk-2 holds no SAE: run `dvc repro sae@topk-2`"):
        read_saes(tmp_path, ["topk-2"])


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"batch_blocks": 0}, {"budgets": ()}, {"budgets": (0, 1)}])
def test_a_wrong_configuration_names_the_field(wrong):
    with pytest.raises(InputError, match=f"`{next(iter(wrong))}` must be a"):
        SpliceConfig(**wrong)
