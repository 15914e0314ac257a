"""Rows and plain text out of files that people wrote. Whatever such a file holds, reading it gives rows or text, or
raises InputError with one sentence that names the file, the line and what would be right."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from trimtab.errors import InputError

TABLES = (".jsonl", ".parquet")
"""Endings of the files that `read_rows` takes."""
SLICE = 4096
"""Rows of a parquet file in memory at a time."""
_ENCODINGS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_KINDS = {
    type(None): "null",
    dict: "an object",
    list: "a list",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
}


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in what its byte order mark says; lines end with a line feed."""
    text = "".join(line for _, line in _lines(path, newline=None))
    if "\0" in text:
        raise InputError(f"{path} holds NUL characters, so it is binary or in an unmarked UTF-16: save it as UTF-8.")
    return text


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of each row of a .jsonl or .parquet file, at least one. `place` is such as `line 3` or, in parquet,
    `row 3`, counted from 1. Blank lines are passed over. Files of any size take little memory."""
    empty = True
    for place, row in _parquet(path) if path.suffix.lower() == ".parquet" else _json_lines(path):
        empty = False
        yield place, row
    if empty:
        raise InputError(f"{path} holds no rows: give it at least one.")


def cell(row: dict[str, Any], column: str, where: str) -> Any:
    """A row's value of a column. Raises InputError, which begins with `where`, for a row without it."""
    if column not in row:
        has = ", ".join(key if key.isprintable() else repr(key) for key in sorted(map(str, row))) or "none"
        raise InputError(f"{where} has no column `{column}`; it has {has}.")
    return row[column]


def kind(value: Any) -> str:
    """What to call the type of a cell, as people who write JSON do."""
    return _KINDS.get(type(value), f"of type {type(value).__name__}")


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in _lines(path, newline="\n"):  # JSON's strings may hold every other character that ends a line
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "\\ud" in line.lower():
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError(
                f"Cannot read {path}, line {number}: half of a surrogate pair, which is no character."
            ) from None
        except RecursionError:
            raise InputError(f"Cannot read {path}, line {number}: nested too deeply to be read.") from None
        except ValueError as error:
            reason = getattr(error, "msg", None) or str(error).split(";")[0]
            raise InputError(
                f"Cannot read {path}, line {number}: not JSON ({reason}); write one object on each line."
            ) from None
        if not isinstance(row, dict):
            raise InputError(
                f"Cannot read {path}, line {number}: {kind(row)} where an object with named columns should stand."
            )
        yield f"line {number}", row


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    _refuse_other(path)
    start = 0
    while True:
        try:
            rows = pl.scan_parquet(path, glob=False).slice(start, SLICE).collect().to_dicts()
        except (OSError, ValueError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise InputError(
                f"Cannot read {path}, no whole parquet file ({first_line(error)}): write it anew."
            ) from None
        yield from ((f"row {number}", row) for number, row in enumerate(rows, start=start + 1))
        start += SLICE
        if len(rows) < SLICE:
            return


def _lines(path: Path, newline: str | None) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end) of a text file; `newline` is that of `open`."""
    _refuse_other(path)
    number, encoding = 0, "utf-8-sig"
    try:
        with path.open("rb") as file:
            start = file.read(4)
        encoding = next((name for mark, name in _ENCODINGS.items() if start.startswith(mark)), encoding)
        with path.open(encoding=encoding, newline=newline) as text:
            for number, line in enumerate(text, start=1):
                yield number, line
    except UnicodeError as error:
        bad = number + 1
        if isinstance(error, UnicodeDecodeError):  # of the chunk read last, in which line `bad` ends
            bad += error.object[: error.start].count(b"\n")
        name = encoding.removesuffix("-sig").upper()
        raise InputError(f"Cannot read {path}, line {bad}: not in {name}; save the file as UTF-8.") from None
    except OSError as error:
        raise InputError(f"Cannot read {path} ({error.strerror}): change its permissions, or copy it.") from None


def _refuse_other(path: Path) -> None:
    try:
        there = path.is_file()
    except OSError as error:
        raise InputError(f"Cannot read {path} ({error.strerror}): change its permissions.") from None
    if path.is_dir():
        raise InputError(f"Cannot read {path}, it is a folder: name a file.")
    if not there:
        raise InputError(f"Cannot read {path}, no file is there: name one that exists.")


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
