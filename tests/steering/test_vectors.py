"""Steering vectors under nnsight against plain hooks: logits, decoding, gradients."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from trimtab.errors import InputError
from trimtab.interventions import capture, final_hidden, steer, wrap
from trimtab.steering.vectors import SteeringVectors

IDS = torch.arange(2, 16).view(2, 7)
MASK = torch.ones_like(IDS)
POSITIONS = torch.arange(7).expand(2, -1)
PARTS = {"block": lambda b: b, "mlp": lambda b: b.mlp, "attention": lambda b: b.self_attn}


@pytest.fixture
def wrapped(tiny_llama, tokenizer):
    return wrap(tiny_llama, tokenizer)


def filled(layers, place="block", rank=None):
    made = SteeringVectors(layers, 16, place=place, rank=rank, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    return made


def by_hooks(model, made, **inputs):
    """The last hidden states of transformers with plain forward hooks adding the vectors."""

    def add(vector):
        return lambda _, __, out: out + vector if isinstance(out, torch.Tensor) else (out[0] + vector, *out[1:])

    blocks = model.model.layers
    handles = [
        PARTS[made.place](blocks[layer]).register_forward_hook(add(vector))
        for layer, vector in zip(made.layers, made.vectors(), strict=True)
    ]
    try:
        return model.model(**inputs).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("place", ["block", "mlp", "attention"])
@pytest.mark.parametrize(("layers", "rank"), [((0, 1, 2), None), ((2,), None), ((2, 0), None), ((0, 1, 2), 2)])
def test_the_view_equals_plain_hooks(tiny_llama, wrapped, place, layers, rank):
    made = filled(layers, place, rank)
    ours = final_hidden(made.applied_to(wrapped), IDS, MASK, POSITIONS)
    theirs = by_hooks(tiny_llama, made, input_ids=IDS)
    torch.testing.assert_close(ours, theirs)
    chance = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    parameters = list(made.parameters())
    for one, other in zip(
        torch.autograd.grad((ours * chance).sum(), parameters),
        torch.autograd.grad((theirs * chance).sum(), parameters),
        strict=True,
    ):
        assert one.norm() > 0
        torch.testing.assert_close(one, other)


def test_zero_vectors_change_no_bit_and_the_model_stays_clean(tiny_llama, wrapped):
    made = SteeringVectors([0, 1, 2], 16)
    with torch.no_grad():
        plain = tiny_llama.model(input_ids=IDS).last_hidden_state
        assert torch.equal(final_hidden(made.applied_to(wrapped), IDS, MASK, POSITIONS), plain)
        filled([0, 1, 2]).applied_to(wrapped)
        assert torch.equal(final_hidden(wrapped, IDS, MASK, POSITIONS), plain)


def test_the_view_follows_its_vectors(wrapped):
    made = filled([1])
    view = made.applied_to(wrapped)
    with torch.no_grad():
        before = final_hidden(view, IDS, MASK, POSITIONS)
        made.scale = 0.0
        assert torch.equal(final_hidden(view, IDS, MASK, POSITIONS), final_hidden(wrapped, IDS, MASK, POSITIONS))
        made.scale = 1.0
        made.weight.mul_(2)
        assert not torch.allclose(final_hidden(view, IDS, MASK, POSITIONS), before)


def test_decoding_with_a_cache_equals_the_whole_pass(wrapped):
    view = filled([0, 2]).applied_to(wrapped)
    cache = DynamicCache()
    with torch.no_grad():
        whole = final_hidden(view, IDS, MASK, POSITIONS)
        first = final_hidden(view, IDS[:, :4], MASK[:, :4], POSITIONS[:, :4], cache)
        rest = [
            final_hidden(view, IDS[:, t : t + 1], MASK[:, : t + 1], POSITIONS[:, t : t + 1], cache) for t in (4, 5, 6)
        ]
    torch.testing.assert_close(torch.cat([first, *rest], dim=1), whole)


def test_nnsights_own_generate_is_steered_too(tiny_llama, wrapped):
    made = filled([0, 1, 2])
    with made.applied_to(wrapped).generate(IDS[:1], max_new_tokens=4, do_sample=False) as tracer:
        ids = tracer.result.save()
    expected = IDS[:1]
    with torch.no_grad():
        for _ in range(ids.shape[1] - 7):
            hidden = by_hooks(tiny_llama, made, input_ids=expected)
            expected = torch.cat([expected, tiny_llama.lm_head(hidden[:, -1]).argmax(1, keepdim=True)], dim=1)
    assert torch.equal(ids, expected)


def test_bad_choices_are_refused(wrapped):
    with pytest.raises(InputError, match="distinct"):
        SteeringVectors([1, 1], 16)
    with pytest.raises(InputError, match="between 1 and 2"):
        SteeringVectors([0, 1], 16, rank=3)
    with pytest.raises(InputError, match="0 to 2"):
        SteeringVectors([3], 16).applied_to(wrapped)
    with pytest.raises(InputError, match="distinct"):
        steer(wrapped, [1, 1], lambda: torch.zeros(2, 16))


def test_vectors_below_the_resolution_of_16_bits_add_up(tokenizer):
    """Blocks that add nothing, and a stream of about 4, whose neighbours in bf16 are 0.03 apart: vectors of 0.003 would
    each be rounded away. Gradients are sums in fp32."""
    config = LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=8, num_hidden_layers=12, num_attention_heads=2
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(4 + torch.rand(258, 16, generator=torch.Generator().manual_seed(0)))
    model = model.bfloat16()
    made = SteeringVectors(range(12), 16)
    with torch.no_grad():
        made.weight.fill_(0.003)
        made.weight[:, 8:] *= -1
    view = made.applied_to(wrap(model, tokenizer))
    before = model.model.embed_tokens(IDS).float()
    after = capture(view, IDS, MASK, [11])[11].float()
    assert (after - before - made.weight.sum(0)).abs().max() < 0.017
    assert (after - before)[..., :8].min() > 0.02
    assert (after - before)[..., 8:].max() < -0.02
    hidden = final_hidden(view, IDS, MASK, POSITIONS)
    hidden.float().square().sum().backward()
    assert made.weight.grad.dtype == torch.float32
    torch.testing.assert_close(made.weight.grad, made.weight.grad[:1].expand(12, -1), rtol=1e-2, atol=1e-3)
