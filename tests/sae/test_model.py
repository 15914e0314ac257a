"""Encoding, decoding and saving against definitions."""

import torch

from trimtab.sae import SAE


def make(d_model=12, latents=40):
    return SAE(d_model, latents, generator=torch.Generator().manual_seed(0))


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
    exact, fast = sae.encode(x, 8), sae.encode(x, 8, torch.bfloat16)
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


def test_saving_keeps_every_weight(tmp_path):
    sae, x = make(), torch.randn(20, 12)
    sae.save(tmp_path / "sae.safetensors", {"site": "3"})
    read = SAE.load(tmp_path / "sae.safetensors")
    assert torch.equal(read.decode(read.encode(x, 5)), sae.decode(sae.encode(x, 5)))
