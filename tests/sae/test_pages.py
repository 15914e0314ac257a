"""Cards: what they say against a plain computation, and that no text can be anything but text in them."""

import copy

import numpy as np
import pytest
import torch

from tests.pages import HOSTILE, Reader
from trimtab.activations import ActivationCache
from trimtab.errors import InputError
from trimtab.interventions import capture, wrap
from trimtab.markup import escaped, visible
from trimtab.sae import SAE
from trimtab.sae.contexts import Contexts
from trimtab.sae.pages import Context, Feature, Features, Piece, card, latents_in, pieces, table

SITE, K = 1, 6


@pytest.fixture(scope="module")
def sae(caches):
    cache = ActivationCache(caches / "train", SITE)
    fresh = SAE(cache.d_model, 40, K, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        fresh.b_enc[7] = -1e6  # a latent that never fires
    return fresh.fold(cache.mean, cache.statistics.scale)


@pytest.fixture(scope="module")
def wrapped(tiny_llama, tokenizer):
    return wrap(tiny_llama, tokenizer)


@pytest.fixture(scope="module")
def features(sae, caches, wrapped, tokenizer):
    contexts = Contexts.collect(sae, ActivationCache(caches / "test", SITE), K, window=16)
    return Features(sae, contexts, wrapped, tokenizer, origin="hierarchical-6 <seed 0>")


def test_a_feature_says_what_the_sae_and_the_model_hold(features, sae, tiny_llama, tokenizer):
    latent = int(np.argsort(features.density)[-3])
    feature = features[latent]
    contexts = features.contexts
    mine = slice(*contexts.pointers[latent : latent + 2])
    assert feature.density == (mine.stop - mine.start) / len(contexts.token)
    assert feature.median_rank == features.median_rank[latent]
    peaks = [max(piece.activation for piece in context.pieces) for context in feature.contexts]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] == contexts.values[mine].max()
    example = contexts.top(latent, 1)[0]
    assert "".join(piece.text for piece in feature.contexts[0].pieces) == tokenizer.decode(example.tokens.tolist())

    row = sae.W_dec[latent].detach()
    cosines = torch.nn.functional.cosine_similarity(sae.W_dec.detach(), row[None])
    order = [i for i in cosines.argsort(descending=True).tolist() if i != latent]
    assert [i for i, _ in feature.nearest] == order[:8]
    assert feature.nearest[0][1] == pytest.approx(cosines[order[0]].item(), abs=1e-5)

    logits = tiny_llama.lm_head.weight.detach() @ (row * tiny_llama.model.norm.weight.detach())
    logits -= logits.mean()
    logits[:2] = 0  # <s> and </s> are special
    best = logits.argmax()
    assert feature.promoted[0][1] == pytest.approx(logits[best].item(), abs=1e-4)
    assert feature.suppressed[0][1] == pytest.approx(logits.min().item(), abs=1e-4)
    assert len(feature.promoted) == len(feature.suppressed) == 8


def test_a_card_highlights_by_strength_and_names_the_activation(features):
    feature = features[int(np.argmax(features.density))]
    reader = Reader(card(feature))
    marks = [
        (float(attributes["title"]), float(attributes["style"].rpartition(",")[2].strip(" )")))
        for tag, attributes in reader.tags
        if tag == "span" and "background-color" in attributes.get("style", "")
    ]
    fired = [piece for context in feature.contexts for piece in context.pieces if piece.activation > 0]
    assert len(marks) == len(fired) > 8
    ordered = sorted(marks)
    assert [alpha for _, alpha in ordered] == sorted(alpha for _, alpha in marks)
    assert ordered[-1][1] == 0.55
    assert sum(tag == "b" for tag, _ in reader.tags) >= 1 + len(feature.contexts)
    for words in (f"Latent {feature.latent}", "hierarchical-6 <seed 0>", f"{feature.density:.3%}", "typical rank"):
        assert words in reader.text
    assert ("dense" in reader.text) == (feature.density > 0.1)


def test_a_card_sets_no_colour_of_its_own_and_fetches_nothing(features):
    source = card(features[int(np.argmax(features.density))])
    reader = Reader(source)
    assert {tag for tag, _ in reader.tags} <= {"div", "span", "b"}
    for _, attributes in reader.tags:
        assert set(attributes) <= {"style", "title", "dir"}
        declared = {part.split(":")[0].strip() for part in attributes.get("style", "").split(";")}
        assert "color" not in declared
    assert "url(" not in source
    assert "://" not in source


def test_a_latent_that_never_fires_has_a_card(features):
    feature = features[7]
    assert feature.density == 0
    assert feature.contexts == []
    text = Reader(card(feature)).text
    assert "It never fires." in text
    assert "nan" not in text


def test_latents_that_do_not_exist_are_named(features):
    for latent in (40, -1):
        with pytest.raises(InputError, match=f"has latents 0 to 39, not {latent}"):
            features[latent]


def test_text_of_any_kind_stays_text():
    feature = Feature(
        3, HOSTILE, 0.5, 2.0, 6,
        [Context(1, 0, [Piece(HOSTILE, 1.0), Piece(HOSTILE, 0.0)])], [(HOSTILE, 1.0)], [(HOSTILE, -1.0)], [(4, 0.5)],
    )  # fmt: skip
    source = card(feature)
    reader = Reader(source)
    assert {tag for tag, _ in reader.tags} <= {"div", "span", "b"}
    assert reader.text.count('<script>alert("1")</script>') == 5
    assert not set(source) & set("\x00\x1b\x9b\u202e\u202c\u200b\u2066\n")
    assert "␛[31mred" in reader.text
    assert "[U+202E]abc[U+202C]" in reader.text


def test_what_is_made_visible_and_what_is_left():
    assert visible("a\n\tb\r") == "a↵⇥b␍"
    assert visible("naïve 日本 שלום 👩\u200d🔬 e\u0301") == "naïve 日本 שלום 👩\u200d🔬 e\u0301"
    assert visible("\u00a0\u2028\ufeff\x7f\ud800") == "[U+00A0][U+2028][U+FEFF][U+007F][U+D800]"
    assert escaped("<&\"'>") == "&lt;&amp;&quot;&#x27;&gt;"


def test_characters_of_several_tokens_are_not_torn(tokenizer):
    tokens = np.array(tokenizer("aö…b", add_special_tokens=False)["input_ids"])
    assert len(tokens) == 7
    found = pieces(tokenizer, tokens, np.array([0, 1, 2, 0, 5, 4, 0], dtype=np.float32))
    assert found == [("a", 0.0), ("ö", 2.0), ("…", 5.0), ("b", 0.0)]
    torn = pieces(tokenizer, tokens[2:4], np.zeros(2, dtype=np.float32))  # a window that begins and ends in the middle
    assert "".join(piece.text for piece in torn) == tokenizer.decode(tokens[2:4].tolist())


def test_latents_of_a_typed_text_are_those_of_its_residuals(sae, wrapped, tokenizer):
    text = "wörd <b>7</b>"
    fired = latents_in(text, sae, SITE, wrapped, tokenizer, 3)
    ids = torch.tensor([[0, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
    residual = capture(wrapped, ids, torch.ones_like(ids), [SITE])[SITE][0, 1:]
    assert len(fired) == ids.shape[1] - 1
    for x, (_, latents) in zip(residual, fired, strict=True):
        pre = (sae.W_enc.detach() @ x + sae.b_enc.detach()).relu()
        best = pre.topk(3)
        want = [(i, v) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True) if v > 0]
        assert [i for i, _ in latents] == [i for i, _ in want]
        assert [v for _, v in latents] == pytest.approx([v for _, v in want], rel=1e-3, abs=1e-3)
    reader = Reader(table(fired))
    assert {tag for tag, _ in reader.tags} == {"table", "thead", "tbody", "tr", "th", "td", "span"}
    assert "<" in reader.text


def test_the_first_token_has_no_latents_where_there_is_no_bos(sae, wrapped, tokenizer):
    without = copy.deepcopy(tokenizer)
    without.bos_token = None
    fired = latents_in("abc", sae, SITE, wrapped, without, 3)
    assert [bool(token.latents) for token in fired] == [False, True, True]


def test_a_text_must_have_tokens_and_not_too_many(sae, wrapped, tokenizer):
    for text in ("", "a" * 513):
        with pytest.raises(InputError, match=f"The text has {len(text)} tokens: give 1 to 512"):
            latents_in(text, sae, SITE, wrapped, tokenizer, 3)
