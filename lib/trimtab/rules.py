"""What sections of params.yaml must have in common, known before any work: otherwise a stage would tell after hours.

A rule is a function of sections, and applies where the pipeline has them all. The error that it raises is the first
section's. Rules stand in modules `rules` of the packages that they are about, which `check_rules` finds.
"""

import re
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from trimtab.errors import InputError
from trimtab.validation import nearest_of, of_field, require


class Section(dict[str, Any]):
    """A section with its name."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.name = name

    def __str__(self) -> str:
        return f"section `{self.name}`"


Rule = Callable[..., None]
RULES: list[tuple[tuple[str, ...], Rule]] = []
"""Names of sections, and the rule that takes them."""


def rule(*sections: str) -> Callable[[Rule], Rule]:
    """Add a rule for these sections."""

    def add(function: Rule) -> Rule:
        RULES.append((sections, function))
        return function

    return add


def at_most(name: str, keys: str, limit: str) -> None:
    """Add the rule that numbers of a section, or the largest of its lists, are at most another: `sae.latents`, say."""
    other, _, bound = limit.partition(".")

    @rule(name, other)
    def holds(section: Section, limiting: Section) -> None:
        most = limiting[bound]
        for key in keys.split():
            values = section[key] if isinstance(section[key], list) else [section[key]]
            require(max(values) <= most, key, section[key], f"at most `{bound}` = {most} of {limiting}")


def check_rules(parameters: Mapping[str, Any]) -> None:
    """Raise InputError for the first rule that does not hold."""
    for found in sorted(Path(__file__).parent.glob("*/rules.py")):
        named = re.findall(r'^(?:@rule|at_most)\("(\w+)"', found.read_text(encoding="utf-8"), re.MULTILINE)
        if any(name in parameters for name in named):  # a package takes seconds to import
            import_module(f"trimtab.{found.parent.name}.rules")
    for names, function in RULES:
        if all(name in parameters for name in names):
            try:
                function(*(Section(name, parameters[name]) for name in names))
            except InputError as error:
                raise InputError(f"Section `{names[0]}`: {error}") from None


def told(field: str, function: Callable[[Any], object], value: Any) -> None:
    """Call the function, whose error is that of the field."""
    try:
        function(value)
    except InputError as error:
        raise of_field(field, error) from None


def within(field: str, values: Any, known: Collection[Any], where: str) -> None:
    """All of them, or the single one, must be known."""
    for value in values if isinstance(values, list) else [values]:
        if value not in known:
            hint = nearest_of(value, map(str, known)) if isinstance(value, str) else ""
            raise InputError(f"`{field}` has {value!r}, but {where} has {', '.join(map(str, known)) or 'none'}{hint}.")


def kinds_of(fetch: Section) -> list[str]:
    """Kinds of the texts that are fetched."""
    from trimtab.packages import RECIPES

    packages = (text.removeprefix("package:") for text in fetch["texts"])
    return [RECIPES[name].kind if name in RECIPES else "table" for name in packages]
