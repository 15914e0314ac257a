"""Files that people wrote are read, or named with their line in one sentence; no other exception ever comes."""

import codecs
import errno
import json
import os
import tempfile
from pathlib import Path

import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trimtab.errors import InputError
from trimtab.rl.question_sets import QuestionSet
from trimtab.rows import SLICE, read_rows, read_text
from trimtab.texts import fetch_text, read_documents, slug

GOOD = '{"text": "a"}'
CELLS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(["text", "question", "answer", "id", "name", "split"]) | st.text()
ROWS = st.dictionaries(NAMES, CELLS, max_size=4)
LINES = st.lists((ROWS | CELLS).map(json.dumps) | st.text() | st.just(""), max_size=5)
FILES = (
    st.binary(max_size=200)
    | LINES.map("\n".join).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.tuples(LINES.map("\r\n".join), st.sampled_from(["utf-8-sig", "utf-16", "utf-32", "latin-1"])).map(
        lambda pair: pair[0].encode(pair[1], "replace")
    )
)


def only_input_errors(read):
    try:
        return read()
    except InputError as error:
        message = str(error)
        assert len(message.splitlines()) == 1, message
        assert message.endswith("."), message
        return None


@settings(max_examples=150, deadline=None)
@given(content=FILES, suffix=st.sampled_from([".jsonl", ".txt"]))
@example(content=b'{"text": "\\ud800"}', suffix=".jsonl")
@example(content=b'{"text": "a", "id": "\\udfff"}', suffix=".jsonl")
@example(content=b"[" * 100_000, suffix=".jsonl")
@example(content=b'{"text": ' + b"9" * 5000 + b"}", suffix=".jsonl")
@example(content=b'{"a\\nb": 1}', suffix=".jsonl")
def test_whatever_a_file_of_texts_holds_it_gives_documents_or_one_sentence(content, suffix):
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / f"f{suffix}"
        path.write_bytes(content)
        if only_input_errors(lambda: fetch_text(str(path), Path(place) / "text" / slug(str(path)))):
            assert read_documents(Path(place) / "text")["text"].str.len_chars().min() > 0


@settings(max_examples=150, deadline=None)
@given(content=FILES)
@example(content=b'{"question": {}, "answer": 1}')
@example(content=b'{"question": "q", "answer": [[1]]}')
@example(content=b'{"question": "q", "answer": "\\ud800"}')
def test_whatever_a_file_of_questions_holds_it_gives_items_or_one_sentence(content):
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "f.jsonl"
        path.write_bytes(content)
        for split in ("train", "test"):
            items = only_input_errors(
                lambda split=split: QuestionSet(name="f", source=str(path)).items(split, 1, seed=0)
            )
            assert all(item.question and item.answer for item in items or [])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_parquet_file_that_was_cut_or_changed_gives_documents_or_one_sentence(data):
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "f.parquet"
        pl.DataFrame({"text": [f"text {i}" for i in range(50)], "n": range(50)}).write_parquet(path)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        only_input_errors(lambda: fetch_text(str(path), Path(place) / "text/f"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl holds no rows: give it at least one"),
        ("a.jsonl", b"\n \n", r"a\.jsonl holds no rows"),
        ("a.jsonl", f'{GOOD}\n{{"text": '.encode(), r"Cannot read .*a\.jsonl, line 2: not JSON \(Expecting value\)"),
        ("a.jsonl", f"{GOOD}\n\n[1]".encode(), r"a\.jsonl, line 3: a list where an object"),
        ("a.jsonl", f"{GOOD}\n{GOOD}\nnull".encode(), r"a\.jsonl, line 3: null where an object"),
        ("a.jsonl", f'{GOOD}\n{{"text": {{"a": 1}}}}'.encode(), r"a\.jsonl: line 2 has a `text` that is an object"),
        ("a.jsonl", f'{GOOD}\n{{"text": ["a"]}}'.encode(), r"a\.jsonl: line 2 has a `text` that is a list"),
        ("a.jsonl", f'{GOOD}\n{{"text": null}}\n{GOOD}'.encode(), r"a\.jsonl: line 2 has a `text` that is null"),
        ("a.jsonl", f'{GOOD}\n{{"body": "x"}}\n{GOOD}'.encode(), "line 2 has no column `text`; it has body"),
        ("a.jsonl", f"{GOOD}\n{{}}".encode(), "line 2 has no column `text`; it has none"),
        (
            "a.jsonl",
            f"{GOOD}\n{GOOD}\n".encode() + b'{"text": "\xe4"}',
            r"line 3: not in UTF-8; save the file as UTF-8",
        ),
        ("a.jsonl", f"{GOOD}\n".encode() * 5000 + b"\xff", "line 5001: not in UTF-8"),
        ("a.jsonl", codecs.BOM_UTF16_LE + b"a", "line 1: not in UTF-16"),
        ("a.jsonl", b'{"text": "\\udc00"}', "line 1: half of a surrogate pair"),
        ("a.txt", "ein\nUml\u00e4ut".encode("latin-1"), r"a\.txt, line 2: not in UTF-8"),
        ("a.txt", "text".encode("utf-16-le"), r"a\.txt holds NUL characters"),
        ("a.txt", b"", r"a\.txt holds no documents"),
        ("a.parquet", b"PAR1", r"Cannot read .*a\.parquet, no whole parquet file"),
        ("a.parquet", b"", r"Cannot read .*a\.parquet, no whole parquet file"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        fetch_text(str(tmp_path / name), tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_byte_order_marks_blank_lines_and_ends_of_lines_do_not_matter(tmp_path, encoding, end):
    (tmp_path / "a.jsonl").write_bytes(f'{end}{{"text": "ä\u2028b"}}{end}{end}{GOOD}{end}'.encode(encoding))
    assert [row["text"] for _, row in read_rows(tmp_path / "a.jsonl")] == ["ä\u2028b", "a"]
    (tmp_path / "a.txt").write_bytes(f"ä{end}b".encode(encoding))
    assert read_text(tmp_path / "a.txt") == "ä\nb"


def test_a_row_of_parquet_without_a_text_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    texts = ["a"] * (2 * SLICE)
    pl.DataFrame({"text": [*texts, None]}).write_parquet(path)
    with pytest.raises(InputError, match=rf"a\.parquet: row {2 * SLICE + 1} has a `text` that is null"):
        fetch_text(str(path), tmp_path / "out")
    pl.DataFrame({"text": texts}).write_parquet(path)
    assert sum(1 for _ in read_rows(path)) == 2 * SLICE
    pl.DataFrame({"text": []}).write_parquet(path)
    with pytest.raises(InputError, match=r"a\.parquet holds no rows"):
        fetch_text(str(path), tmp_path / "out")


def test_brackets_in_a_path_are_no_pattern(tmp_path):
    folder = tmp_path / "run [1] *"
    folder.mkdir()
    pl.DataFrame({"text": ["a"]}).write_parquet(folder / "a.parquet")
    assert [row for _, row in read_rows(folder / "a.parquet")] == [{"text": "a"}]


def test_folders_of_texts_are_named_with_the_file_that_does_not_fit(tmp_path):
    folder = tmp_path / "books.txt"
    folder.mkdir()
    with pytest.raises(InputError, match=r"books\.txt is a folder without \.txt files"):
        fetch_text(str(folder), tmp_path / "out")
    (folder / "part.txt").mkdir()
    (folder / "part.txt/a.txt").write_text("a", encoding="utf-8")
    fetch_text(str(folder), tmp_path / "text" / slug(str(folder)))
    assert read_documents(tmp_path / "text")["text"].to_list() == ["a"]
    (folder / "b.txt").write_bytes(b"\xe4")
    with pytest.raises(InputError, match=r"Cannot read .*books\.txt/b\.txt, line 1: not in UTF-8"):
        fetch_text(str(folder), tmp_path / "out")
    (folder / "b.txt").unlink()
    (folder / "b.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"Cannot read .*b\.txt, no file is there"):
        fetch_text(str(folder), tmp_path / "out")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_folder_in_the_place_of_a_table_is_named(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=r"is a folder without \.txt files"):
        fetch_text(str(tmp_path / name), tmp_path / "out")
    with pytest.raises(InputError, match="it is a folder: name a file"):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch, name):
    (tmp_path / name).write_text(GOOD, encoding="utf-8")

    def refuse(path, *_, **__):  # as the system does, but to root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"Cannot read .*Permission denied.*: change its permissions"):
        fetch_text(str(tmp_path / name), tmp_path / "out")


def test_names_of_files_in_another_encoding_are_documents_all_the_same(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("a", encoding="utf-8")
    fetch_text(str(folder), tmp_path / "text" / slug(str(folder)))
    assert read_documents(tmp_path / "text")["name"].to_list() == ["caf\ufffd"]
