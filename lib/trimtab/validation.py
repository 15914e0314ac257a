"""Checks that the configurations share. Each raises InputError in one sentence that names the field and its value.

Messages begin with the field in backticks; who knows the section of params.yaml puts that before.
"""

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

from trimtab.errors import InputError

Made = TypeVar("Made")
Span = tuple[int, int] | tuple[float, float]
"""The least and the largest value of a number in a name: a whole number, or one of at most three decimals."""
MOST_WORKERS = 1024
"""Threads or processes at most: more of them no machine starts."""
WIDEST = 2**20
"""Width of a model at most: a matrix of two such has no place in any memory."""
LAST_SEED = 2**32 - 1
"""The largest seed that numpy and torch both take."""


def made_of(kind: type[Made], values: Mapping[str, Any]) -> Made:
    """A configuration of the values that bear its fields' names; lists become tuples."""
    names = [name for name in getattr(kind, "__dataclass_fields__") if name in values]  # noqa: B009 (mypy knows no such)
    return kind(**{name: tuple(values[name]) if isinstance(values[name], list) else values[name] for name in names})


def shown(value: Any) -> str:
    """A value as Python writes it, cut where it is long."""
    try:
        text = repr(list(value) if isinstance(value, tuple) else value)
    except (ValueError, RecursionError):
        return "a value too large to show"
    return text if len(text) <= 80 else f"{text[:60]} ..."


def require(holds: bool, field: str, value: Any, rule: str) -> None:
    """`rule` completes the sentence: must be ..."""
    if not holds:
        raise InputError(f"`{field}` must be {rule}, not {shown(value)}.")


def at_least(least: int, config: object, *fields: str, most: int | float = math.inf) -> None:
    """Whole numbers from `least` to `most`."""
    span = f"at least {least}" if math.isinf(most) else f"from {least} to {most:.0f}"
    for field in fields:
        value = getattr(config, field)
        require(least <= value <= most, field, value, f"a whole number, {span}")


def positive(config: object, *fields: str, most: int | float = math.inf) -> None:
    """Finite numbers above 0, up to `most`."""
    span = "" if math.isinf(most) else f" up to {most:g}"
    for field in fields:
        value = getattr(config, field)
        require(0 < value <= most and math.isfinite(value), field, value, f"a positive number{span}")


def not_negative(config: object, *fields: str, most: int | float = math.inf) -> None:
    """Finite numbers, 0 or more, up to `most`."""
    span = "of 0 or more" if math.isinf(most) else f"from 0 to {most:g}"
    for field in fields:
        value = getattr(config, field)
        require(0 <= value <= most and math.isfinite(value), field, value, f"a number {span}")


def fraction(config: object, *fields: str) -> None:
    """Numbers strictly between 0 and 1."""
    for field in fields:
        value = getattr(config, field)
        require(0 < value < 1, field, value, "a number between 0 and 1")


def listed(config: object, *fields: str, least: int = 1) -> None:
    """Lists that hold something, nothing twice, and no whole number below `least`."""
    for field in fields:
        values = getattr(config, field)
        distinct = len({repr(each) for each in values}) == len(values)
        require(bool(values) and distinct, field, values, "a list of at least one item, each of them once")
        small = [each for each in values if isinstance(each, int) and each < least]
        require(not small, field, values, f"a list of whole numbers of at least {least}")


def ascending(config: object, *fields: str, least: int = 1) -> None:
    """Lists of whole numbers from `least` upwards, each larger than the one before."""
    listed(config, *fields, least=least)
    for field in fields:
        values = getattr(config, field)
        require(all(one < other for one, other in pairwise(values)), field, values, "a list in ascending order")


def rates(config: object, *fields: str) -> None:
    """Lists of learning rates."""
    listed(config, *fields)
    for field in fields:
        values = getattr(config, field)
        good = all(rate > 0 and math.isfinite(rate) for rate in values)
        require(good, field, values, "a list of positive numbers")


def seeds(config: object, *fields: str) -> None:
    """Lists of seeds."""
    listed(config, *fields, least=0)
    for field in fields:
        values = getattr(config, field)
        require(max(values) <= LAST_SEED, field, values, f"a list of whole numbers from 0 to {LAST_SEED}")


def one_of(allowed: Collection[str], config: object, *fields: str) -> None:
    """Strings of a set."""
    for field in fields:
        value = getattr(config, field)
        require(value in allowed, field, value, f"one of {', '.join(allowed)}{nearest_of(value, allowed)}")


def nearest_of(value: Any, allowed: Iterable[str], form: str = " (the nearest is {})") -> str:
    """A hint, of that form, at the name that was probably meant, or nothing."""
    close = difflib.get_close_matches(str(value), list(allowed), n=1, cutoff=0.5)
    return form.format(close[0]) if close else ""


def read_name(name: str, what: str, forms: Mapping[str, Sequence[Span]]) -> tuple[str, list[Any]]:
    """The form that a name has, and its numbers: capital letters of a form, as in `lora-R`, each with its span.

    Raises InputError for a name of no form, and for all spellings of a number but one: two would be one thing twice.
    """
    for form, spans in forms.items():
        if match := re.fullmatch(re.sub("[A-Z]", r"(-?\\d{1,300}(?:\\.\\d{0,300})?)", form), name):
            numbers = [_nearest_in(span, float(text)) for span, text in zip(spans, match.groups(), strict=True)]
            spelt = [str(number).removesuffix(".0") for number in numbers]
            nearest = re.sub("[A-Z]", "{}", form).format(*spelt)
            if nearest == name:
                return form, numbers
            told = zip(re.findall("[A-Z]", form), spans, strict=True)
            rule = " and ".join(f"{letter} from {least} to {most}" for letter, (least, most) in told)
            raise InputError(f"{shown(name)} is not {what}: the nearest is {nearest}, of {form} with {rule}.")
    more = f" and {len(forms) - 12} more" if len(forms) > 12 else ""
    known = ", ".join([*forms][:12]) + more
    raise InputError(f"{shown(name)} is not {what}: write one of {known}{nearest_of(name, forms)}.")


def _nearest_in(span: Span, number: float) -> int | float:
    least, most = span
    return type(least)(min(max(round(number, 0 if isinstance(least, int) else 3), least), most))


def of_field(field: str, error: InputError) -> InputError:
    """The error of a value, such as the name of an arm, as that of the field that holds it."""
    text = str(error)
    return error if re.match(r"`\w+`", text) else InputError(f"`{field}`: {text}")
