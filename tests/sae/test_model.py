"""Encoding, decoding, folding and saving against definitions."""

import json

import pytest
import torch

from trimtab.errors import InputError
from trimtab.marks import MARK
from trimtab.sae import SAE, Latents


def make(d_model=12, latents=40, k=5, jump=False):
    sae = SAE(d_model, latents, k, jump=jump, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_dec.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        if sae.log_threshold is not None:
            sae.log_threshold.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
    return sae


def test_encode_gives_the_largest_in_order():
    sae, x = make(), torch.randn(20, 12)
    pre = (x @ sae.W_enc.T + sae.b_enc).clamp(min=0)
    latents = sae.encode(x, 7)
    torch.testing.assert_close(latents.values, pre.sort(dim=1, descending=True).values[:, :7])
    torch.testing.assert_close(latents.values, pre.gather(1, latents.indices))
    assert (latents.values.diff(dim=1) <= 0).all()


def test_decode_equals_a_dense_product_for_every_prefix():
    sae, x = make(), torch.randn(20, 12)
    with torch.no_grad():
        sae.b_dec.normal_()
    latents = sae.encode(x, 9)
    for k in (1, 4, 9):
        dense = torch.zeros(20, 40).scatter(1, latents.indices[:, :k], latents.values[:, :k])
        torch.testing.assert_close(sae.decode(latents.prefix(k)), dense @ sae.W_dec + sae.b_dec)


def test_the_bf16_encoder_is_close_and_returns_fp32():
    sae, x = make(576, 512), torch.randn(64, 576)
    exact, fast = sae.encode(x, 8), sae.encode(x, 8, dtype=torch.bfloat16)
    assert fast.values.dtype == torch.float32
    assert (fast.values - exact.values).norm() / exact.values.norm() < 0.01


def test_decoder_rows_stay_on_the_sphere_and_gradients_tangent_to_it():
    sae, x = make(), torch.randn(20, 12)
    sae.decode(sae.encode(x, 5)).square().sum().backward()
    sae.project_gradient()
    torch.testing.assert_close((sae.W_dec.grad * sae.W_dec).sum(1), torch.zeros(40), atol=1e-4, rtol=0)
    assert sae.W_dec.grad.norm() > 1
    with torch.no_grad():
        sae.W_dec.mul_(3)
    sae.normalise_decoder()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))


def test_a_threshold_lets_rows_differ_in_their_latents():
    sae, x = make(), torch.randn(20, 12)
    pre = (x @ sae.W_enc.T + sae.b_enc).detach()
    latents = sae.encode(x, threshold=0.8)
    assert torch.equal((latents.values > 0).sum(1), (pre > 0.8).sum(1))
    dense = torch.zeros(20, 40).scatter(1, latents.indices, latents.values)
    torch.testing.assert_close(dense, torch.where(pre > 0.8, pre, 0))
    assert sae.encode(x, 2, threshold=0.8).values.shape == (20, 2)
    one = sae.encode(x[:1], threshold=0.8)  # a single token needs no other
    torch.testing.assert_close(one.values[0], latents.values[0, : one.values.shape[1]])
    assert sae.encode(x, threshold=1e6).values.eq(0).all()


def test_a_jumprelu_sae_keeps_what_exceeds_its_own_thresholds():
    sae, x = make(jump=True), torch.randn(20, 12)
    pre = (x @ sae.W_enc.T + sae.b_enc).detach()
    latents = sae.encode(x)
    dense = torch.zeros(20, 40).scatter(1, latents.indices, latents.values)
    torch.testing.assert_close(dense, torch.where(pre > sae.log_threshold.exp(), pre, 0).detach())


@pytest.mark.parametrize("jump", [False, True])
def test_folding_gives_the_same_sae_for_raw_inputs(jump):
    sae, raw = make(jump=jump), 7 * torch.randn(30, 12) + 2
    sae.thresholds = {3: 0.6}
    mean, scale = raw.mean(0), 0.17
    x = (raw - mean) * scale
    folded = sae.fold(mean, scale)
    codes, raw_codes = sae.encode(x, 5), folded.encode(raw, 5)
    assert torch.equal(codes.indices[codes.values > 0], raw_codes.indices[raw_codes.values > 0])
    torch.testing.assert_close(raw_codes.values * scale, codes.values, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close((folded.decode(raw_codes) - mean) * scale, sae.decode(codes), atol=1e-5, rtol=1e-4)
    counts = [(s.encode(v, threshold=s.thresholds[3]).values > 0).sum() for s, v in ((sae, x), (folded, raw))]
    assert counts[0] == counts[1]
    back = folded.unfold(mean, scale)
    for name, weight in sae.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], weight, atol=1e-5, rtol=1e-4)
    assert back.thresholds[3] == pytest.approx(0.6)


@pytest.mark.parametrize("jump", [False, True])
def test_saving_keeps_weights_budget_kind_and_thresholds(tmp_path, jump):
    sae, x = make(jump=jump), torch.randn(20, 12)
    sae.thresholds = {3: 0.25}
    sae.save_pretrained(tmp_path / "sae", {"site": 3, "arm": "topk-5"})
    read = SAE.from_pretrained(tmp_path / "sae")
    assert torch.equal(read.decode(read.encode(x)), sae.decode(sae.encode(x)))
    assert (read.k, read.thresholds) == (5, {3: 0.25})
    assert sorted(p.name for p in (tmp_path / "sae").iterdir()) == [MARK, "config.json", "sae.safetensors"]
    assert json.loads((tmp_path / "sae/config.json").read_text(encoding="utf-8"))["metadata"] == {
        "site": 3,
        "arm": "topk-5",
    }


def test_files_that_do_not_fit_are_named(tmp_path):
    make().save_pretrained(tmp_path / "sae")
    config = json.loads((tmp_path / "sae/config.json").read_text(encoding="utf-8"))
    (tmp_path / "sae/config.json").write_text(json.dumps(config | {"latents": 41}), encoding="utf-8")
    with pytest.raises(InputError, match=r"sae\.safetensors does not fit config\.json"):
        SAE.from_pretrained(tmp_path / "sae")
    (tmp_path / "sae/config.json").write_text(json.dumps({"architecture": "topk"}), encoding="utf-8")
    with pytest.raises(InputError, match="is not an SAE of Trimtab's format"):
        SAE.from_pretrained(tmp_path / "sae")
    with pytest.raises(InputError, match="is missing"):
        SAE.from_pretrained(tmp_path / "nothing")


def test_a_budget_outside_the_dictionary_is_refused():
    for k in (0, 41):
        with pytest.raises(InputError, match="between 1 and the dictionary's 40 latents"):
            make().encode(torch.randn(2, 12), k)
    with pytest.raises(InputError, match="cannot have a budget of k = 41"):
        make(k=41)


def test_descending_sorts_only_what_is_not_sorted():
    latents = Latents(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[4, 5, 6]]))
    ordered = latents.descending()
    assert ordered.values.tolist() == [[3, 2, 1]]
    assert ordered.indices.tolist() == [[5, 6, 4]]
    assert ordered.descending() is ordered
