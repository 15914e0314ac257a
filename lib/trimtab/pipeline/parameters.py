"""What a stage may inject into a notebook: the names and types of its parameters cell, checked before a run."""

import ast
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache, lru_cache
from typing import Any, get_type_hints

import nbformat
from pydantic import TypeAdapter, ValidationError

from trimtab.errors import InputError
from trimtab.pipeline.base import BaseConfig
from trimtab.pipeline.sections import nearest, parse_yaml
from trimtab.validation import Made, made_of, shown

TAG = "parameters"
PATHS = ("data/", "scratch/")
"""How the default of a parameter begins that is the path of an input or output, which need not be given."""
MOST = 2**53
"""No parameter may exceed it: larger counts cannot be meant, and are no longer exact as floating-point numbers."""
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
UNSEEN = ("size", "nfiles")
"""Keys that DVC leaves out of what it looks a run up by, wherever they stand: they are its own names for what it notes
of outputs. A parameter of that name could be changed, and the results of its old value would come back."""


def parse_notebook(text: str, name: str) -> nbformat.NotebookNode:
    """A source notebook from its text. Raises InputError where nbformat cannot read it."""
    try:
        notebook = nbformat.reads(text, as_version=4)
        nbformat.validate(notebook)
    except Exception:  # whatever nbformat makes of text that is no notebook
        raise InputError(f"{name} is not a notebook that nbformat can read.") from None
    return notebook


def declared_parameters(notebook: nbformat.NotebookNode, name: str) -> dict[str, tuple[Any, Any]]:
    """The parameters cell as {parameter: (type, default)}; a type is the annotation, or else that of the default.

    Raises InputError where the cell is missing, or holds anything but assignments of literals to distinct names.
    """
    cells = [c for c in notebook.cells if c.cell_type == "code" and TAG in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise InputError(f"{name} has {len(cells)} cells tagged `{TAG}`: a stage's notebook has exactly one.")
    found: dict[str, tuple[Any, Any]] = {}
    annotation: ast.expr | None
    try:
        body = ast.parse(cells[0].source).body
    except SyntaxError as error:
        raise InputError(
            f"{name}: the parameters cell is not valid Python (line {error.lineno}: {error.msg})."
        ) from None
    for node in body:
        match node:
            case ast.Assign(targets=[ast.Name(id=key)], value=value):
                annotation = None
            case ast.AnnAssign(target=ast.Name(id=key), value=ast.expr() as value):
                annotation = node.annotation
            case _:
                raise InputError(f"{name}: `{ast.unparse(node)}` in the parameters cell is not `name = literal`.")
        try:
            default = ast.literal_eval(value)
        except ValueError:
            raise InputError(f"{name}: parameter `{key}` is not a plain literal: `{ast.unparse(value)}`.") from None
        if key in found:
            raise InputError(f"{name}: parameter `{key}` is set twice in the parameters cell.")
        found[key] = (_type(annotation, default, f"{name}: `{key}`"), default)
    return found


def pairs(given: Sequence[str] | None, option: str) -> dict[str, str]:
    """The values of an option that is given as NAME=VALUE, by name. Raises InputError for another form, and for a name
    that is given twice."""
    found: dict[str, str] = {}
    for item in given or []:
        name, equals, value = item.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"{option} {shown(item)} is not NAME=VALUE.")
        if name in found:
            raise InputError(f"{option} gives `{name}` twice: keep one of them.")
        found[name] = value
    return found


@lru_cache(maxsize=512)
def literal(name: str, text: str) -> Any:
    """The value of `--set NAME=TEXT`, by the rules of params.yaml. Raises InputError where it is no YAML."""
    try:
        return parse_yaml(text)
    except InputError as error:
        raise InputError(f"`{name}` of the command line is {shown(text)}, no YAML value: {error}") from None


def collect(
    notebook: nbformat.NotebookNode,
    name: str,
    sections: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Flatten sections and single settings, which go before them, to one set of parameters that fits the notebook.

    Every parameter of a notebook that calls `notebook.begin` must be given, unless its default is a path of data/ or
    scratch/: quick defaults are for running by hand.

    Raises InputError naming the key, its section and the notebook where a key is missing, unknown to the notebook (with
    the nearest that it has), in two sections, or of the wrong type.
    """
    return fit(Declared.of(notebook, name), sections, settings)


@dataclass(frozen=True)
class Declared:
    """What takes parameters: a notebook, or a configuration that is filled from one section."""

    name: str
    """As errors name it."""
    parameters: Mapping[str, tuple[Any, Any]]
    """{name: (type, default)}"""
    whole: bool
    """Whether all must be given, but for paths."""
    groups: Sequence[Collection[str]] = ()
    """Parameters that go with one another, by which the section that lacks one is found."""

    @classmethod
    def of(cls, notebook: nbformat.NotebookNode, name: str, groups: Sequence[Collection[str]] = ()) -> "Declared":
        """Raises InputError where the parameters cell is not what `declared_parameters` takes."""
        code = (cell.source for cell in notebook.cells if cell.cell_type == "code")
        whole = any(re.search(r"^[^#\n]*\bbegin\(globals\(\)\)", source, re.MULTILINE) for source in code)
        return cls(name, declared_parameters(notebook, name), whole, groups)

    @classmethod
    def fields_of(cls, kind: type, name: str) -> "Declared":
        """The fields of a configuration class."""
        hints = get_type_hints(kind)
        return cls(name, {field.name: (hints[field.name], field.default) for field in fields(kind)}, True)

    def require(self, key: str, where: str) -> None:
        """Raise InputError for an unknown parameter."""
        if key not in self.parameters:
            raise InputError(f"`{key}` of {where} is no parameter of {self.name}{nearest(key, self.parameters)}")

    def fitting(self, key: str, value: Any, where: str) -> Any:
        """The value, if it is of the declared type and can be meant."""
        self.require(key, where)
        kind, default = self.parameters[key]
        try:
            reason = _strange(value)
            fitting = _adapter(kind).validate_python(value, strict=True)
        except ValidationError:
            usual = "" if default is MISSING else f", by default {shown(default)}"
            reason = reason or f"it takes {_spell(kind)}{usual}"
        if reason:
            raise InputError(f"`{key}` of {where} is {shown(value)}, which does not fit {self.name}: {reason}.")
        return fitting


def fit(
    declared: Declared,
    sections: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    later: Collection[str] = (),
) -> dict[str, Any]:
    """See `collect`; `later`: parameters that will be given besides."""
    found: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for section, values in sections.items():
        for key, value in values.items():
            where = f"section `{section}`"
            if key in UNSEEN:
                raise InputError(f"`{key}` of {where}: DVC's run cache takes no notice of that name; choose another.")
            if key in origin:
                raise InputError(f"`{key}` comes from {origin[key]} and from {where}: keep one for {declared.name}.")
            found[key] = declared.fitting(key, value, where)
            origin[key] = where
    found |= {key: declared.fitting(key, value, "the command line") for key, value in settings.items()}
    if declared.whole:
        for key, (kind, default) in declared.parameters.items():
            usual = isinstance(default, str) and default.startswith(PATHS)
            if not usual and key not in found and key not in later:
                lacking = _section_of(key, sections, declared.groups) or "the command line"
                raise InputError(
                    f"{lacking[0].upper()}{lacking[1:]} lacks `{key}`, which {declared.name} needs: {_spell(kind)}."
                )
    return found


def configure(kind: type[Made], values: Mapping[str, Any], sections: Mapping[str, Mapping[str, Any]]) -> Made:
    """A configuration of the values that bear its fields' names, lists as tuples (see `Stage.configure`). Raises the
    InputError of the configuration, with the section before it."""
    try:
        return made_of(kind, values)
    except InputError as error:
        told = re.findall(r"`(\w+)`", str(error))
        where = next((s for key in told for s, held in sections.items() if key in held), None)
        raise InputError(f"Section `{where}`: {error}" if where else str(error)) from None


@cache
def _adapter(kind: Any) -> Any:
    return TypeAdapter(kind)


def _strange(value: Any) -> str | None:
    """Why a value cannot be meant, whatever the parameter: a number that is none or beyond all counting, say."""
    if isinstance(value, float) and not math.isfinite(value):
        return "it must be a finite number"
    if isinstance(value, int | float) and abs(value) > MOST:
        return f"no number may exceed {MOST}"
    if isinstance(value, str) and UNPRINTABLE.search(value):
        return "text must hold no control characters"
    if isinstance(value, list):
        return next(filter(None, map(_strange, value)), None)
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            return "its keys must be strings"
        return next(filter(None, map(_strange, value.values())), None)
    return None


def _section_of(key: str, sections: Mapping[str, Mapping[str, Any]], groups: Sequence[Collection[str]]) -> str | None:
    """The section that a missing key belongs to: the one that has the most of the keys that go with it."""
    if key in {field.name for field in fields(BaseConfig)}:
        return "section `base`"
    group = next((set(group) for group in groups if key in group), set())
    others = [section for section in sections if section != "base"]
    best = max(reversed(others), key=lambda section: len(group & set(sections[section])), default=None)
    return f"section `{best}`" if best else None


def _type(annotation: ast.expr | None, default: Any, where: str) -> Any:
    if annotation is not None:
        text = ast.unparse(annotation)
        try:
            # Only builtin names: enough for `float | None` and `list[int]`, and nothing that could run code.
            kinds = {k.__name__: k for k in (int, float, str, bool, list, dict, tuple)} | {"None": None}
            return eval(compile(ast.Expression(annotation), where, "eval"), {"__builtins__": {}}, kinds)
        except (NameError, TypeError, SyntaxError):
            raise InputError(f"{where} has the annotation `{text}`: use int, float, str, bool, list or dict.") from None
    if isinstance(default, list) and default and len({type(item) for item in default}) == 1:
        return list[type(default[0])]  # type: ignore[misc]
    return Any if default is None else type(default)


def _spell(kind: Any) -> str:
    plain = isinstance(kind, type) and not hasattr(kind, "__args__")
    return kind.__name__ if plain else str(kind).replace("collections.abc.Sequence", "list")
