"""What a stage may inject into a notebook: the names and types of its parameters cell, checked before a run."""

import ast
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from pydantic import ConfigDict, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from trimtab.errors import InputError

TAG = "parameters"
UNSEEN = ("size", "nfiles")
"""Keys that DVC leaves out of what it looks a run up by, wherever they stand: they are its own names for what it notes
of outputs. A parameter of that name could be changed, and the results of its old value would come back."""


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


def parse_yaml(text: str) -> Any:
    """YAML 1.2, as DVC reads and writes it: there 1e-05 is a number, which YAML 1.1 takes for a string."""
    return YAML(typ="safe", pure=True).load(text)


def read_sections(path: Path, sections: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The named sections of params.yaml. Raises InputError for a missing file, broken YAML or an unknown section."""
    try:
        content = parse_yaml(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} is missing: compose it with `trimtab compose`.") from None
    except YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} does not hold sections: compose it with `trimtab compose`.")
    for section in sections:
        if not isinstance(content.get(section), dict):
            raise InputError(f"{path} has no section `{section}`{_nearest(section, content)}")
    return {section: content[section] for section in sections}


def collect(
    notebook: nbformat.NotebookNode,
    name: str,
    sections: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Flatten sections and single settings to one set of parameters that fits the notebook.

    Raises InputError naming the key, its section and the notebook where a key is unknown to the notebook (with the
    nearest that it has), given twice, or of the wrong type.
    """
    declared = declared_parameters(notebook, name)
    sources = [(f"section `{section}`", values) for section, values in sections.items()]
    parameters: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for where, values in [*sources, ("the command line", settings)]:
        for key, value in values.items():
            if key in UNSEEN and where != "the command line":
                raise InputError(f"`{key}` of {where}: DVC's run cache takes no notice of that name; choose another.")
            if key not in declared:
                raise InputError(f"`{key}` of {where} is no parameter of {name}{_nearest(key, declared)}")
            if key in parameters:
                raise InputError(f"`{key}` comes from {origin[key]} and from {where}: keep one of them for {name}.")
            try:
                adapter = TypeAdapter(declared[key][0], config=ConfigDict(allow_inf_nan=False))
                parameters[key] = adapter.validate_python(value, strict=True)
            except ValidationError:
                raise InputError(
                    f"`{key}` of {where} is {value!r}, which does not fit {name}: "
                    f"its parameters cell has {_spell(declared[key][0])}, by default {declared[key][1]!r}."
                ) from None
            origin[key] = where
    return parameters


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
    return kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean `{close[0]}`?" if close else f"; it has {', '.join(f'`{k}`' for k in known)}."
