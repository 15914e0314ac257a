"""Capture and splice equal plain transformers, skip what they need not run, and leave model and tokenizer alone."""

import pytest
import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from trimtab.errors import InputError
from trimtab.interventions import capture, direct_logits, resume, splice, wrap

SMALL = {"vocab_size": 258, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}


def model_of(family, tiny_llama):
    torch.manual_seed(1)
    if family == "gemma2":
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
        return Gemma2ForCausalLM(Gemma2Config(**SMALL, **shape, num_key_value_heads=1, head_dim=8)).eval()
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**SMALL, n_embd=16, n_layer=3, n_head=2)).eval()
    if family == "falcon":  # its blocks return tuples
        config = FalconConfig(**SMALL, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
        return FalconForCausalLM(config).eval()
    return tiny_llama


FAMILIES = ["llama", "gemma2", "gpt2", "falcon"]


def blocks_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_capture_equals_forward_hooks_and_hidden_states(tiny_llama, tokenizer, family, padded):
    model = model_of(family, tiny_llama)
    wrapped = wrap(model, tokenizer)
    ids = torch.randint(2, 258, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 6:] = 0
    captured = capture(wrapped, ids, mask, [2, 0, 1])
    seen = {}
    blocks = blocks_of(model)
    handles = [
        block.register_forward_hook(lambda *a, s=site: seen.update({s: a[2] if torch.is_tensor(a[2]) else a[2][0]}))
        for site, block in enumerate(blocks)
    ]
    with torch.inference_mode():
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    assert list(captured) == [2, 0, 1]
    for site, hidden in captured.items():
        torch.testing.assert_close(hidden[mask.bool()], seen[site][mask.bool()])
        if site < 2:
            torch.testing.assert_close(hidden[mask.bool()], states[site + 1][mask.bool()])


def test_a_padded_row_equals_the_row_alone(tiny_llama, tokenizer):
    wrapped = wrap(tiny_llama, tokenizer)
    row = torch.randint(2, 258, (1, 5))
    wide = torch.cat([torch.randint(2, 258, (1, 9)), torch.nn.functional.pad(row, (0, 4), value=1)])
    mask = torch.ones_like(wide)
    mask[1, 5:] = 0
    alone = capture(wrapped, row, torch.ones_like(row), [1])[1][0]
    torch.testing.assert_close(capture(wrapped, wide, mask, [1])[1][1, :5], alone)


def test_blocks_above_the_deepest_site_never_run(tiny_llama, tokenizer):
    ran = []
    handles = [
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(tiny_llama.model.layers)
    ]
    ids = torch.randint(2, 258, (1, 4))
    capture(wrap(tiny_llama, tokenizer), ids, torch.ones_like(ids), [1])
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("site", [0, 1, 2])
def test_splice_equals_a_forward_hook_that_replaces_the_output(tiny_llama, tokenizer, family, padded, site):
    model = model_of(family, tiny_llama)
    ids = torch.randint(2, 258, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 6:] = 0
    noise = torch.randn(3, 11, 16, generator=torch.Generator().manual_seed(1))

    def hook(_module, _arguments, output):
        return output + noise if torch.is_tensor(output) else (output[0] + noise, *output[1:])

    with torch.inference_mode():
        clean = model(input_ids=ids, attention_mask=mask).logits
        handle = blocks_of(model)[site].register_forward_hook(hook)
        want = model(input_ids=ids, attention_mask=mask).logits
        handle.remove()
    assert (want - clean).abs().max() > 0.01
    wrapped = wrap(model, tokenizer)
    got = splice(wrapped, ids, mask, site, lambda residual: residual + noise)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()])
    same = splice(wrapped, ids, mask, site, lambda residual: residual)
    torch.testing.assert_close(same[mask.bool()], clean[mask.bool()])


def test_resuming_runs_only_the_blocks_above_the_site(tiny_llama, tokenizer):
    wrapped = wrap(tiny_llama, tokenizer)
    ids = torch.randint(2, 258, (2, 7))
    residual = capture(wrapped, ids, torch.ones_like(ids), [1])[1]
    ran = []
    handles = [
        block.mlp.register_forward_pre_hook(lambda _, args, i=i: ran.append((i, args[0].shape[1])))
        for i, block in enumerate(tiny_llama.model.layers)
    ]
    resume(wrapped, ids, torch.ones_like(ids), 1, residual)
    for handle in handles:
        handle.remove()
    assert [block for block, tokens in ran if tokens > 1] == [2]


@pytest.mark.parametrize(("family", "norm"), [("llama", "norm"), ("gemma2", "norm"), ("gpt2", "ln_f")])
def test_direct_logits_are_the_gain_and_the_unembedding(tiny_llama, tokenizer, family, norm):
    model = model_of(family, tiny_llama)
    module = getattr(model.transformer if family == "gpt2" else model.model, norm)
    kept = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.uniform_(0.5, 2)
    gain = module.weight.detach() + (1 if family == "gemma2" else 0)  # Gemma's gain is written less 1
    directions = torch.randn(4, 16)
    centred = directions - directions.mean(dim=1, keepdim=True) if family == "gpt2" else directions
    if family == "gpt2":  # LayerNorm divides by the length of the centred direction
        centred = centred * directions.square().mean(1, keepdim=True).sqrt() / centred.square().mean(1, True).sqrt()
    want = (centred * gain) @ model.get_output_embeddings().weight.detach().T
    got = direct_logits(wrap(model, tokenizer), directions)
    with torch.no_grad():
        module.weight.copy_(kept)
    torch.testing.assert_close(got, want - want.mean(dim=1, keepdim=True), atol=1e-4, rtol=1e-4)
    assert got.mean(dim=1).abs().max() < 1e-5


def test_model_and_tokenizer_stay_as_they_were(tiny_llama, tokenizer):
    ids = torch.randint(2, 258, (1, 4))
    with torch.inference_mode():
        before = tiny_llama(ids).logits
    side = tokenizer.padding_side
    residual = capture(wrap(tiny_llama, tokenizer), ids, torch.ones_like(ids), [0])[0]
    resume(wrap(tiny_llama, tokenizer), ids, torch.ones_like(ids), 0, residual + 1)
    with torch.inference_mode():
        assert torch.equal(tiny_llama(ids).logits, before)
    assert tokenizer.padding_side == side


@pytest.mark.parametrize("sites", [[3], [-1], []])
def test_sites_that_do_not_exist_are_named(tiny_llama, tokenizer, sites):
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(InputError, match="is not a block of this model: 0 to 2"):
        capture(wrap(tiny_llama, tokenizer), ids, ids, sites)
    for site in sites:
        with pytest.raises(InputError, match="is not a block of this model: 0 to 2"):
            resume(wrap(tiny_llama, tokenizer), ids, ids, site, torch.zeros(1, 4, 16))
