"""Capture equals plain transformers, stops early, and leaves model and tokenizer as they were."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from trimtab.errors import InputError
from trimtab.interventions import capture, wrap

SMALL = {"vocab_size": 258, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}


def models(tiny_llama):
    torch.manual_seed(1)
    gemma = Gemma2Config(
        **SMALL, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    gpt2 = GPT2Config(**SMALL, n_embd=16, n_layer=3, n_head=2)
    return {"llama": tiny_llama, "gemma2": Gemma2ForCausalLM(gemma).eval(), "gpt2": GPT2LMHeadModel(gpt2).eval()}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("padded", [False, True])
def test_capture_equals_forward_hooks_and_hidden_states(tiny_llama, tokenizer, family, padded):
    model = models(tiny_llama)[family]
    wrapped = wrap(model, tokenizer)
    ids = torch.randint(2, 258, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 6:] = 0
    captured = capture(wrapped, ids, mask, [2, 0, 1])
    seen = {}
    blocks = model.transformer.h if family == "gpt2" else model.model.layers
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


def test_model_and_tokenizer_stay_as_they_were(tiny_llama, tokenizer):
    ids = torch.randint(2, 258, (1, 4))
    with torch.inference_mode():
        before = tiny_llama(ids).logits
    side = tokenizer.padding_side
    capture(wrap(tiny_llama, tokenizer), ids, torch.ones_like(ids), [0])
    with torch.inference_mode():
        assert torch.equal(tiny_llama(ids).logits, before)
    assert tokenizer.padding_side == side


@pytest.mark.parametrize("sites", [[3], [-1], []])
def test_sites_that_do_not_exist_are_named(tiny_llama, tokenizer, sites):
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(InputError, match="is not a block of this model: 0 to 2"):
        capture(wrap(tiny_llama, tokenizer), ids, ids, sites)
