"""Mixers: causal, with a cache as without, with padding as alone; norm conventions and ablation arms."""

import pytest
import torch
import torch.nn.functional as F

from trimtab.errors import InputError
from trimtab.rebased.mixers import ARMS, BaseConv, PolynomialAttention
from trimtab.rebased.model import MIXERS, ModelConfig, make_mixer
from trimtab.rebased.softmax import SoftmaxAttention

CONFIG = ModelConfig(10, d_model=24, heads=3, d_k=4, window=5)


@pytest.fixture(params=MIXERS)
def mixer(request):
    torch.manual_seed(0)
    made = make_mixer(request.param, CONFIG).double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.startswith(("gamma", "beta")):
                parameter += torch.randn_like(parameter)
    return made


@pytest.fixture
def x():
    return torch.randn(2, 23, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_no_token_sees_a_later_one(mixer, x):
    changed = x.clone()
    changed[:, 14:] += 1
    assert torch.allclose(mixer(x)[:, :14], mixer(changed)[:, :14])
    assert not torch.allclose(mixer(x)[:, 14:], mixer(changed)[:, 14:])


@pytest.mark.parametrize("cuts", [(1, 2, 3), (9,), (9, 15, 16), (22,)], ids=str)
def test_with_a_cache_it_continues_where_it_stopped(mixer, x, cuts):
    cache, whole = {}, mixer(x)
    with torch.no_grad():
        pieces = [mixer(x[:, a:b], None, cache) for a, b in zip((0, *cuts), (*cuts, 23), strict=True)]
    assert torch.allclose(torch.cat(pieces, dim=1), whole)


def test_padding_on_the_left_changes_nothing(mixer, x):
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[1, :8] = False
    cache, alone_cache = {}, {}
    with torch.no_grad():
        padded, alone = mixer(x, mask, cache), mixer(x[1:, 8:], None, alone_cache)
        assert torch.allclose(padded[1:, 8:], alone)
        assert torch.allclose(padded[:1], mixer(x[:1]))
        assert torch.allclose(mixer(x[:, :1], None, cache)[1:], mixer(x[1:, :1], None, alone_cache))


def test_a_window_is_full_attention_with_a_band(x):
    torch.manual_seed(0)
    banded = SoftmaxAttention(24, 3, window=5).double()
    q, k, v = banded.qkv(x).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
    back = torch.arange(23)[:, None] - torch.arange(23)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=(back >= 0) & (back < 5))
    assert torch.allclose(banded(x), banded.out(mixed.transpose(1, 2).flatten(2)))


def test_rotary_angles_turn_by_the_difference_of_places(x):
    torch.manual_seed(0)
    rotary, plain = SoftmaxAttention(24, 3, rotary=True).double(), SoftmaxAttention(24, 3).double()
    plain.load_state_dict(rotary.state_dict())
    assert not torch.allclose(rotary(x), plain(x))
    later = torch.cat([torch.zeros(2, 7, 24, dtype=torch.float64), x], dim=1)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[:, :7] = False
    assert torch.allclose(rotary(later, mask)[:, 7:], rotary(x))


class TestPolynomialAttention:
    def test_it_works_with_default_arguments(self):
        assert PolynomialAttention(32)(torch.randn(2, 9, 32)).shape == (2, 9, 32)

    @pytest.mark.parametrize("arm", ARMS)
    def test_arms_are_the_papers_ablations(self, arm, x):
        made = PolynomialAttention(24, 3, 4, arm=arm).double()
        raw = made.q(x)
        if made.gamma_q is not None:
            with torch.no_grad():
                made.gamma_q += torch.randn(12)
                made.beta_q += torch.randn(12)
        expected = {
            "based": lambda: raw,
            "rebased-square": lambda: raw,
            "rebased-norm": lambda: F.layer_norm(raw, (12,)),
            "rebased-affine": lambda: made.gamma_q * raw + made.beta_q,
            "rebased": lambda: F.layer_norm(raw, (12,), made.gamma_q, made.beta_q),
        }[arm]()
        assert torch.allclose(made.mapped(raw, made.gamma_q, made.beta_q).flatten(2), expected)
        made(x).sum().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for n, p in made.named_parameters() if n[:2] != "be")

    def test_the_norm_over_each_head_is_another_convention(self, x):
        over_all, over_each = (PolynomialAttention(24, 3, 4, over=over).double() for over in ("heads", "head"))
        raw = over_all.q(x)
        each = over_each.mapped(raw, over_each.gamma_q, over_each.beta_q)
        assert torch.allclose(each, F.layer_norm(raw.unflatten(-1, (3, 4)), (4,)))
        assert not torch.allclose(over_all.mapped(raw, over_all.gamma_q, over_all.beta_q), each)

    def test_queries_and_keys_have_maps_of_their_own(self, x):
        made = PolynomialAttention(24, 3, 4).double()
        before = made(x)
        with torch.no_grad():
            made.gamma_q *= torch.linspace(0.5, 2, 12)
        queries = made(x)
        with torch.no_grad():
            made.gamma_k *= torch.linspace(0.5, 2, 12)
        assert not torch.allclose(queries, before)
        assert not torch.allclose(made(x), queries)

    def test_heads_are_not_mixed_up(self, x):
        """Three heads are three models of one head each, added up."""
        made = PolynomialAttention(24, 3, 4, arm="based").double()
        total = 0
        for h in range(3):
            one = PolynomialAttention(24, 1, 4, d_v=8, arm="based").double()
            with torch.no_grad():
                for name, width in (("q", 4), ("k", 4), ("v", 8)):
                    getattr(one, name).weight.copy_(getattr(made, name).weight[h * width : (h + 1) * width])
                one.out.weight.copy_(made.out.weight[:, h * 8 : (h + 1) * 8])
            total = total + one(x)
        assert torch.allclose(made(x), total)

    def test_what_cannot_be_built_is_refused(self):
        with pytest.raises(InputError, match="not an arm"):
            PolynomialAttention(24, arm="rebase")
        with pytest.raises(InputError, match="do not divide"):
            PolynomialAttention(24, heads=5)
        with pytest.raises(InputError, match="do not divide"):
            SoftmaxAttention(24, heads=5)


def test_base_conv_by_hand():
    made = BaseConv(1)
    with torch.no_grad():
        made.conv.weight.copy_(torch.tensor([[[1.0, 10.0, 100.0]]]))
        made.conv.bias.zero_()
        made.projection.weight.fill_(2.0)
        made.projection.bias.zero_()
    out = made(torch.tensor([[[1.0], [2.0], [3.0]]]))
    # conv: 100, 210, 321; times 2 x; plus x.
    assert out.flatten().tolist() == [201.0, 842.0, 1929.0]
