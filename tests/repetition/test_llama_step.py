"""A step through a Llama's weights alone is a step of the model."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from trimtab.interventions import steer, wrap
from trimtab.repetition.arms import PlainPolicy, SteeredPolicy
from trimtab.repetition.decoding import Decoder, continuations
from trimtab.repetition.llama_step import LlamaStep
from trimtab.rl.adapters import inject_lora
from trimtab.rl.cache import RoomyCache
from trimtab.rl.policy import FullPolicy, Policy

ROWS, PREFIX, STEPS = 3, 5, 6
IDS = torch.randint(0, 60, (ROWS, PREFIX + STEPS), generator=torch.Generator().manual_seed(0))


def llama(dtype=torch.float32, **options):
    """Six heads that share two of keys and values; weights large enough that attention and norms matter."""
    config = LlamaConfig(
        vocab_size=60, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, initializer_range=0.3, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.uniform_(0.5, 2)
    return model.to(dtype)


@torch.no_grad()
def stepped(policy, ids=IDS):
    """Hidden states and logits of the last STEPS tokens, one at a time after the model's own pass over the others."""
    model, cache = policy.view._module, RoomyCache(ids.shape[1])
    policy.hidden(ids[:, :PREFIX], torch.ones_like(ids[:, :PREFIX]), torch.arange(PREFIX).expand(len(ids), -1), cache)
    step = LlamaStep.of(policy, len(ids))
    hidden = [step.hidden(ids[:, t], t, cache) for t in range(PREFIX, ids.shape[1])]
    assert model.dtype == hidden[0].dtype
    return torch.stack(hidden, dim=1), torch.stack([step.logits(h) for h in hidden], dim=1)


@torch.no_grad()
def whole(policy, ids=IDS):
    """The same from one pass without a cache, through nnsight."""
    hidden = policy.hidden(ids, torch.ones_like(ids), torch.arange(ids.shape[1]).expand(len(ids), -1))[:, PREFIX:]
    return hidden, policy.logits(hidden)


VECTORS = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"head_dim": 16, "tie_word_embeddings": True}, {"rope_parameters": LLAMA3}])
@pytest.mark.parametrize("kind", ["plain", "full", "steered"])
def test_it_computes_what_the_model_does(tokenizer, kind, options):
    wrapped = wrap(llama(**options), tokenizer)
    policy = {"plain": PlainPolicy, "full": FullPolicy, "steered": lambda w: SteeredPolicy(w, VECTORS)}[kind](wrapped)
    for found, expected in zip(stepped(policy), whole(policy), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if kind == "steered":
        assert (whole(policy)[0] - whole(PlainPolicy(wrapped))[0]).abs().max() > 0.1


def test_in_bfloat16_it_is_as_near_to_fp32_as_the_model_is(tokenizer):
    exact = whole(PlainPolicy(wrap(llama(), tokenizer)))[1]
    policy = PlainPolicy(wrap(llama(torch.bfloat16), tokenizer))
    own, step = ((each[1].float() - exact).square().mean() for each in (whole(policy), stepped(policy)))
    assert 0 < step < 1.5 * own


def test_it_takes_only_what_it_knows(tokenizer):
    wrapped = wrap(llama(), tokenizer)
    assert LlamaStep.of(PlainPolicy(wrapped), 1) is not None
    assert LlamaStep.of(Policy(steer(wrapped, [0], lambda: VECTORS[:1]), {}), 1) is None
    adapted = wrap(llama(), tokenizer)
    assert LlamaStep.of(Policy(adapted, inject_lora(adapted, "all-linear", 2, 0), adapted), 1) is None
    for model in (llama(attention_bias=True), llama(hidden_act="gelu")):
        assert LlamaStep.of(PlainPolicy(wrap(model, tokenizer)), 1) is None
    other = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2)).requires_grad_(False)
    assert LlamaStep.of(PlainPolicy(wrap(other, tokenizer)), 1) is None


def test_continuations_follow_an_update_of_every_weight(tokenizer):
    policy = FullPolicy(wrap(llama(), tokenizer))
    before = continuations(policy, IDS[:, :PREFIX], STEPS, Decoder.of("greedy"))
    for weight in policy.trained.values():
        weight.data.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)), alpha=0.3)
    policy.publish()
    after = continuations(policy, IDS[:, :PREFIX], STEPS, Decoder.of("greedy"))
    fresh = copy.deepcopy(policy.view._module)
    assert not torch.equal(before, after)
    with torch.no_grad():
        logits = fresh(torch.cat([IDS[:, :PREFIX], after], dim=1)).logits[:, PREFIX - 1 : -1]
    assert torch.equal(after, logits.argmax(dim=2))
