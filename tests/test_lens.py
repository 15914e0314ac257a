"""The logit lens against transformers' own hidden states and plain hooks."""

import copy
import math

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, Gemma2Config, Gemma2ForCausalLM

from trimtab.errors import InputError
from trimtab.interventions import NO_TARGET, compare_lenses, lens, next_tokens, steer, token_text, wrap

IDS = torch.randint(2, 258, (2, 40), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 258, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}


@pytest.fixture(scope="module")
def model(tiny_llama):
    """The tiny model with a final gain that is not 1 and an unembedding large enough to predict something."""
    made = copy.deepcopy(tiny_llama)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        made.model.norm.weight.uniform_(0.5, 2, generator=generator)
        made.lm_head.weight.mul_(20)
    return made


@pytest.fixture(scope="module")
def wrapped(model, tokenizer):
    return wrap(model, tokenizer)


@pytest.fixture(scope="module")
def vectors():
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(2)) * 0.05


def by_hidden_states(model, ids, mask=None, cap=None):
    """[layers, batch, seq, vocabulary] of log-probabilities, by transformers alone."""
    inner = getattr(model, "model", None) or model.transformer
    norm = inner.norm if hasattr(inner, "norm") else inner.ln_f
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[1:]
        # transformers gives the last state after the final norm.
        logits = torch.stack([model.lm_head(h if h is states[-1] else norm(h)) for h in states])
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits.log_softmax(dim=-1)


def by_hooks(model, vectors, ids):
    """The same with plain forward hooks: one adds the vector, a later one reads what the next block is given."""
    read, handles = [], []
    for block, vector in zip(model.model.layers, vectors, strict=True):
        handles.append(block.register_forward_hook(lambda _, __, out, v=vector: out + v))
        handles.append(block.register_forward_hook(lambda _, __, out: read.append(out)))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        found = torch.stack([model.lm_head(model.model.norm(h)) for h in read])
    torch.testing.assert_close(found[-1], logits)
    return found.log_softmax(dim=-1)


def check(found, logp, targets):
    """Every statistic of a lens against its definition on whole distributions."""
    p = logp.exp()
    values, ids = p.topk(found.top_ids.shape[3], dim=-1)
    torch.testing.assert_close(found.top_probabilities, values)
    assert (found.top_ids == ids).float().mean() > 0.999  # but for ties
    torch.testing.assert_close(found.entropy, -(p * logp).sum(-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.kl, (p[-1] * (logp[-1] - logp)).sum(-1), atol=1e-4, rtol=1e-4)
    assert found.kl[-1].max() < 1e-5
    assert found.kl[0].mean() > 1e-4
    asked = targets != NO_TARGET
    wanted = logp.gather(-1, targets.clamp(min=0).expand(len(logp), -1, -1).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found.target_log_probability[:, asked], wanted[:, asked], atol=1e-4, rtol=1e-4)
    place = (logp.argsort(dim=-1, descending=True) == targets.unsqueeze(-1)).float().argmax(-1) + 1
    assert (found.target_rank == place)[:, asked].float().mean() > 0.99
    assert found.target_log_probability[:, ~asked].isnan().all()
    assert (found.target_rank[:, ~asked] == 0).all()


def test_it_equals_hidden_states_read_one_by_one(model, wrapped):
    targets = next_tokens(IDS)
    found = lens(wrapped, IDS, targets=targets, top=5)
    assert found.layers == (0, 1, 2)
    assert torch.equal(targets[:, :-1], IDS[:, 1:])
    check(found, by_hidden_states(model, IDS), targets)


def test_the_last_layer_is_the_model_itself(model, wrapped):
    found = lens(wrapped, IDS, layers=[2], top=258)
    with torch.no_grad():
        p = model(IDS).logits.softmax(dim=-1)
    torch.testing.assert_close(torch.zeros_like(p).scatter(2, found.top_ids[0], found.top_probabilities[0]), p)


def test_a_padded_text_is_read_like_the_text_alone(wrapped):
    ids = torch.cat([IDS[:1], torch.nn.functional.pad(IDS[1:, :11], (0, 29), value=1)])
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    both = lens(wrapped, ids, mask, targets=next_tokens(ids, mask))
    alone = lens(wrapped, IDS[1:, :11], targets=next_tokens(IDS[1:, :11]))
    torch.testing.assert_close(both.entropy[:, 1:, :11], alone.entropy)
    torch.testing.assert_close(
        both.target_log_probability[:, 1:, :11], alone.target_log_probability, equal_nan=True, atol=1e-5, rtol=1e-4
    )
    frame = both.to_frame()
    assert len(frame) == 3 * (40 + 11)
    assert frame.filter(text=1)["position"].max() == 10


def test_a_steered_view_is_read_after_its_vectors(model, wrapped, vectors):
    targets = next_tokens(IDS)
    view = steer(wrapped, [0, 1, 2], lambda: vectors)
    check(lens(view, IDS, targets=targets), by_hooks(model, vectors, IDS), targets)


def test_a_comparison_holds_both_and_their_distance(model, wrapped, vectors):
    targets = next_tokens(IDS)
    found = compare_lenses(wrapped, steer(wrapped, [0, 1, 2], lambda: vectors), IDS, layers=[2, 0], targets=targets)
    steered, clean = by_hooks(model, vectors, IDS), by_hidden_states(model, IDS)
    want = (steered.exp() * (steered - clean)).sum(-1)
    torch.testing.assert_close(found.kl, want[[2, 0]], atol=1e-4, rtol=1e-4)
    assert want.min() > 1e-3
    index = targets[:, :-1].expand(3, -1, -1).unsqueeze(-1)
    change = (steered - clean)[:, :, :-1].gather(-1, index).squeeze(-1)
    torch.testing.assert_close(found.target_change[:, :, :-1], change[[2, 0]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.clean.entropy, lens(wrapped, IDS, layers=[2, 0]).entropy)
    same = compare_lenses(wrapped, steer(wrapped, [0], lambda: torch.zeros(1, 16)), IDS)
    assert same.kl.abs().max() == 0
    assert torch.equal(same.steered.top_ids, same.clean.top_ids)


@pytest.mark.parametrize("cap", [None, 1.0])
def test_the_cap_of_a_configuration_is_honoured(tokenizer, cap):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(1)
    config = Gemma2Config(**SMALL, **shape, num_key_value_heads=1, head_dim=8, final_logit_softcapping=cap)
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    targets = next_tokens(IDS)
    found = lens(wrap(model, tokenizer), IDS, targets=targets, top=5)
    logp = by_hidden_states(model, IDS, cap=cap)
    check(found, logp, targets)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits.log_softmax(-1), logp[-1])


def test_blocks_that_return_tuples_are_read(tokenizer):
    torch.manual_seed(1)
    model = FalconForCausalLM(FalconConfig(**SMALL, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    targets = next_tokens(IDS)
    check(lens(wrap(model, tokenizer), IDS, targets=targets), by_hidden_states(model, IDS), targets)


def test_reduced_precision_is_read(model, tokenizer):
    low = copy.deepcopy(model).to(torch.bfloat16)
    found = lens(wrap(low, tokenizer), IDS)
    assert found.entropy.dtype == torch.float32
    assert (found.entropy - lens(wrap(model, tokenizer), IDS).entropy).abs().mean() < 0.05


def test_the_frame_has_a_row_for_each_layer_and_position(wrapped, tokenizer, vectors):
    targets = torch.full_like(IDS, 77)
    targets[1] = NO_TARGET
    found = compare_lenses(
        wrapped, steer(wrapped, [1], lambda: vectors[:1]), IDS, layers=[0, 2], targets=targets, top=4
    )
    frame = found.clean.to_frame(tokenizer)
    assert len(frame) == 2 * 2 * 40
    row = frame.filter(layer=2, text=0, position=7).row(0, named=True)
    assert row["token"] == token_text(tokenizer, int(IDS[0, 7]))
    assert row["top_tokens"] == [token_text(tokenizer, i) for i in found.clean.top_ids[1, 0, 7].tolist()]
    assert row["target"] == token_text(tokenizer, 77)
    assert row["entropy"] == pytest.approx(float(found.clean.entropy[1, 0, 7]))
    assert math.exp(row["target_log_probability"]) == pytest.approx(float(found.clean.target_probability[1, 0, 7]))
    assert frame.filter(text=1)["target_rank"].null_count() == 80
    assert frame.filter(text=1)["target_log_probability"].null_count() == 80
    both = found.to_frame(tokenizer)
    assert len(both) == len(frame)
    assert both["kl_steered_clean"].to_list() == pytest.approx(found.kl.flatten().tolist())
    change = both.filter(text=0)["target_change"].to_list()
    assert change == pytest.approx(found.target_change[:, 0].flatten().tolist())


def test_what_does_not_fit_is_refused(wrapped, tokenizer, tiny_llama):
    with pytest.raises(InputError, match="0 to 2"):
        lens(wrapped, IDS, layers=[3])
    with pytest.raises(InputError, match="between 1 and the 258"):
        lens(wrapped, IDS, top=259)
    with pytest.raises(InputError, match="target 258 is not a token"):
        lens(wrapped, IDS, targets=torch.full_like(IDS, 258))
    # A model that does something else to its logits than its configuration and parts say.
    odd = copy.deepcopy(tiny_llama)
    odd.lm_head.register_forward_hook(lambda _, args, out: out * (3 if args[0].shape[-2] > 2 else 1))
    with pytest.raises(InputError, match="does not fit"):
        lens(wrap(odd, tokenizer), IDS)
