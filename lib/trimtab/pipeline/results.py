"""What a stage found, as JSON that every parser reads: numbers of any library as plain ones of six digits."""

import dataclasses
import json
import math
from collections.abc import Mapping
from decimal import Decimal
from enum import Enum
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from trimtab.errors import InputError

PROGRESS = "TRIMTAB_PROGRESS"
"""Environment variable, set by the runner: the file to which a notebook appends the folders that hold its progress."""
DEEPEST = 40
"""Levels of nesting: a list that holds itself has no end."""
LONGEST = 1024
"""Bits of a whole number that parsers take; a longer one counts as infinite."""


def plain(value: Any, name: str, unbounded: list[str], depth: int = 0) -> Any:
    """`value` made of None, bool, int, float, str, list and dict alone. Arrays and tensors become lists, paths their
    text, and floats are rounded to six significant digits: enough for every claim, and quiet in a diff. NaN and
    infinity, which are no JSON, become None, and their names are added to `unbounded`.

    Raises InputError naming the metric where two keys would become one, and for a type that means nothing here.
    """
    if depth > DEEPEST:
        raise InputError(f"{name[:60]}... is nested too deeply, or holds itself: give a flat mapping.")
    match value:
        case Enum():
            return plain(value.value, name, unbounded, depth + 1)
        case None | bool():
            return value
        case str():
            return plain_text(value)
        case Integral() if int(value).bit_length() <= LONGEST:
            return int(value)
        case Real() | Decimal():
            return _rounded(_as_float(value), name, unbounded)
        case Path():
            return plain_text(value.as_posix())
        case Mapping():
            return _mapping(value, name, unbounded, depth + 1)
        case set() | frozenset():
            items = [plain(item, f"an item of {name}", unbounded, depth + 1) for item in value]
            return sorted(items, key=lambda each: (str(type(each)), str(each)))
        case list() | tuple():
            return [plain(item, f"{name}[{place}]", unbounded, depth + 1) for place, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return plain(fields, name, unbounded, depth + 1)
    for convert in ("tolist", "to_list", "to_dicts"):  # of numpy and torch, of polars' series, of its frames
        if callable(method := getattr(value, convert, None)) and not isinstance(value, type):
            try:
                held = method()
            except Exception as error:  # of each library its own: of a tensor without data, say, or a sparse one
                raise InputError(
                    f"{name} is {type(value).__name__}, whose numbers cannot be read: give plain numbers."
                ) from error
            return plain(held, name, unbounded, depth + 1)
    raise InputError(f"{name} is {type(value).__name__}, which is no result: give numbers, text, lists or mappings.")


def plain_text(text: str) -> str:
    """The text, with what no encoding can hold spelt out."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def _mapping(value: Mapping[Any, Any], name: str, unbounded: list[str], depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        text = str(plain(key, f"a key of {name}", unbounded, depth))
        if text in found:
            raise InputError(f"{name} has two keys that are both written as {text!r}: give them different names.")
        found[text] = plain(item, f"{name}.{text}", unbounded, depth)
    return found


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except ValueError:  # a signalling NaN
        return math.nan


def _rounded(value: float, name: str, unbounded: list[str]) -> float | None:
    if not math.isfinite(value):
        unbounded.append(f"{name} ({value})")
        return None
    return float(f"{value:.6g}")


def is_results(path: Path) -> bool:
    """Whether a file holds the results of a stage, so that a run may replace it."""
    try:
        return {"metrics", "claims"} <= set(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return False
