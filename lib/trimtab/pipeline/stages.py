"""The stages of dvc.yaml as DVC resolves them: matrices expanded and `${section.key}` filled in from params.yaml.

DVC itself takes seconds to import and tells its errors in paragraphs; what Trimtab needs to know of a stage is little.
"""

import argparse
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

from trimtab.errors import InputError
from trimtab.pipeline.parameters import literal, pairs
from trimtab.pipeline.sections import check_names, nearest, read_parameters, read_yaml
from trimtab.validation import shown

KEYS = (
    "cmd", "deps", "desc", "frozen", "always_changed", "matrix", "meta", "metrics", "outs", "params", "plots",
)  # fmt: skip
"""Keys of a stage. DVC has more (`foreach`, `vars`, `wdir`), which would be second ways to say the same."""
TEMPLATE = re.compile(r"(?<!\\)\$\{(.*?)\}")


@dataclass(frozen=True)
class Stage:
    """One stage, or one of a matrix."""

    name: str
    """As DVC has it: `sae@topk-8`."""
    command: str
    notebook: str | None
    """Source notebook, where the stage runs one."""
    sections: list[str]
    """Sections of params.yaml that are injected into the notebook, or read by `trimtab fetch`."""
    settings: dict[str, Any]
    """Single parameters, of --set."""
    outputs: dict[str, str]
    """Paths by the parameter that holds them, of --out."""
    record: str | None
    """Path of the executed notebook."""
    outs: list[str]
    """All that is declared as outs, metrics and plots."""
    deps: list[str] = field(default_factory=list)
    params: list[str] = field(default_factory=list)
    """Sections and keys of params.yaml that DVC watches: `sae`, `sae.steps`."""


def stages(root: Path, parameters: Mapping[str, Any] | None = None, *, filled: bool = True) -> list[Stage]:
    """All stages, in the order of dvc.yaml. `parameters`: what params.yaml holds; None: it is read where a stage
    mentions it. Without `filled` a matrix is one stage, and `${...}` stays as it is. Raises InputError where the files
    are broken, or do not fit each other."""
    definitions = read_yaml(root / "dvc.yaml", "take the committed one (`git checkout dvc.yaml`)").get("stages", {})
    if not isinstance(definitions, Mapping):
        raise InputError("dvc.yaml: `stages` must be a mapping of names to stages.")
    check_names(definitions, "`stages` of dvc.yaml")
    context = _Context(root, parameters)
    found = (_stages(name, definition, context if filled else None) for name, definition in definitions.items())
    return [stage for some in found for stage in some]


class _Context:
    """params.yaml, read when it is first needed."""

    def __init__(self, root: Path, parameters: Mapping[str, Any] | None) -> None:
        self.root, self.parameters = root, parameters

    def select(self, expression: str, stage: str, item: Mapping[str, Any]) -> Any:
        """The value that `${expression}` stands for in a stage."""
        section, *keys = expression.strip().replace("[", ".").replace("]", "").split(".")
        asked = f"which stage `{stage}` of dvc.yaml takes as ${{{expression}}}"
        if section == "item":
            value: Any = item
            where = f"the matrix of stage `{stage}` of dvc.yaml"
        else:
            if self.parameters is None:
                self.parameters = read_parameters(self.root)
            if section not in self.parameters:
                raise InputError(f"params.yaml lacks section `{section}`, {asked}{nearest(section, self.parameters)}")
            value = self.parameters[section]
            where = f"section `{section}`"
        for key in keys:
            if isinstance(value, Mapping) and key in value:
                value = value[key]
            elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
                value = value[int(key)]
            elif isinstance(value, Mapping):
                raise InputError(f"{where[0].upper() + where[1:]} lacks `{key}`, {asked}{nearest(key, value)}")
            else:
                raise InputError(f"{where[0].upper() + where[1:]} is {shown(value)}, and has no `{key}`, {asked}.")
            where = f"`{key}` of {where}"
        return value

    def fill(self, value: Any, stage: str, item: Mapping[str, Any]) -> Any:
        """The same with every `${...}` replaced, in keys as well."""
        if "${" not in repr(value):  # most of dvc.yaml
            return value
        if isinstance(value, Mapping):
            return {self.fill(key, stage, item): self.fill(each, stage, item) for key, each in value.items()}
        if isinstance(value, list):
            return [self.fill(each, stage, item) for each in value]

        def found(match: re.Match[str]) -> str:
            chosen = self.select(match[1], stage, item)
            if not isinstance(chosen, str | int | float):
                raise InputError(
                    f"{_key(match[1])} must be a string or a number, as stage `{stage}` of dvc.yaml takes it as text, "
                    f"not {shown(chosen)}."
                )
            _check_name(chosen, _key(match[1]), stage)
            return _text(chosen)

        return TEMPLATE.sub(found, value).replace(r"\${", "${")

    def matrix(self, stage: str, given: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """(what stands behind the stage's name, values) of each combination."""
        if not isinstance(given, Mapping) or not given:
            raise InputError(f"dvc.yaml: `matrix` of stage `{stage}` must be a mapping of names to lists.")
        columns: list[list[tuple[str, Any]]] = []
        for key, values in given.items():
            where = f"`{key}` in the matrix of stage `{stage}` of dvc.yaml"
            if isinstance(values, str) and (whole := TEMPLATE.fullmatch(values)):
                where = _key(whole[1])
                values = self.select(whole[1], stage, {})
            if not isinstance(values, list) or not values:
                raise InputError(
                    f"{where} must be a list of at least one item, of which each makes a stage `{stage}`, "
                    f"not {shown(values)}."
                )
            column: dict[str, Any] = {}
            for index, value in enumerate(values):
                if not isinstance(value, list | Mapping):
                    _check_name(value, where, stage)
                name = f"{key}{index}" if isinstance(value, list | Mapping) else _text(value)
                if name in column:
                    raise InputError(f"{where} holds {value!r} twice: each item makes one stage `{stage}`.")
                column[name] = value
            columns.append(list(column.items()))
        for combination in product(*columns):
            yield (
                "-".join(name for name, _ in combination),
                {key: value for key, (_, value) in zip(given, combination, strict=True)},
            )


def _stages(name: Any, definition: Any, context: _Context | None) -> Iterator[Stage]:
    if not isinstance(definition, Mapping):
        raise InputError(f"dvc.yaml: stage `{name}` must be a mapping with `cmd`.")
    check_names(definition, f"Stage `{name}` of dvc.yaml")
    for key in definition:
        if key not in KEYS:
            raise InputError(f"dvc.yaml: stage `{name}` has `{key}`, which is not one of its keys{nearest(key, KEYS)}")
    plain = {key: value for key, value in definition.items() if key not in ("matrix", "meta", "desc")}
    if context is None:
        yield _stage(name, plain)
        return
    if "matrix" not in definition:
        yield _stage(name, context.fill(plain, name, {}))
        return
    for suffix, item in context.matrix(name, definition["matrix"]):
        yield _stage(f"{name}@{suffix}", context.fill(plain, name, item))


def _stage(name: str, definition: Mapping[str, Any]) -> Stage:
    commands = definition.get("cmd")
    commands = [commands] if isinstance(commands, str) else commands
    if not isinstance(commands, list) or not commands or not all(isinstance(each, str) for each in commands):
        raise InputError(f"dvc.yaml: stage `{name}` needs `cmd`, a command or a list of commands.")
    told = [_run(name, each) for each in commands if _words(name, each)[:1] == ["trimtab"]]
    run = next((each for each in told if each.section or each.notebook), argparse.Namespace(**EMPTY))
    outputs = pairs(run.out, "--out")
    record = run.record or (run.notebook and f"records/{Path(run.notebook).name}")
    return Stage(
        name=name,
        command=" && ".join(commands),
        notebook=run.notebook,
        sections=list(run.section or []),
        settings={key: literal(f"--set {key}", value) for key, value in pairs(run.set, "--set").items()},
        outputs=outputs,
        record=record,
        outs=[
            path
            for kind in ("outs", "metrics", "plots")
            if kind in definition
            for path in _paths(name, kind, definition)
        ],
        deps=_paths(name, "deps", definition),
        params=_paths(name, "params", definition),
    )


EMPTY: dict[str, Any] = {"notebook": None, "section": None, "out": None, "set": None, "record": None}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


@lru_cache(maxsize=512)
def _run(name: str, command: str) -> argparse.Namespace:
    """The options of `trimtab run` or `trimtab fetch`; of other commands none."""
    words = _words(name, command)
    parser = _Parser(add_help=False, allow_abbrev=False)
    match words[1:2]:
        case ["run"]:
            parser.add_argument("notebook")
            for option in ("--section", "--out", "--set"):
                parser.add_argument(option, action="append")
            parser.add_argument("--record")
            parser.add_argument("--cell-timeout")
        case ["fetch"]:
            parser.add_argument("--section", type=lambda text: [text], default=["fetch"])
        case _:
            return argparse.Namespace(**EMPTY)
    try:
        return argparse.Namespace(**EMPTY | vars(parser.parse_args(words[2:])))
    except ValueError as error:
        raise InputError(f"dvc.yaml: `cmd` of stage `{name}` does not fit `trimtab {words[1]}`: {error}.") from None


@lru_cache(maxsize=512)
def _words(name: str, command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise InputError(f"dvc.yaml: `cmd` of stage `{name}` is no command line: {error}.") from None


def _paths(name: str, kind: str, definition: Mapping[str, Any]) -> list[str]:
    """The paths of a list whose items are paths, or mappings of a path to its options."""
    given = definition.get(kind) or []
    if not isinstance(given, list):
        raise InputError(f"dvc.yaml: `{kind}` of stage `{name}` must be a list, not {shown(given)}.")
    found = [each for item in given for each in (item if isinstance(item, Mapping) else [item])]
    if not all(isinstance(each, str) for each in found):
        raise InputError(f"dvc.yaml: `{kind}` of stage `{name}` must be a list of strings, not {shown(given)}.")
    return found


def _key(expression: str) -> str:
    section, _, key = expression.strip().partition(".")
    return f"`{key}` of section `{section}`"


def _check_name(value: Any, where: str, stage: str) -> None:
    """What becomes part of a command, a path and a stage's name must need no quotes and lead nowhere else."""
    text = _text(value)
    if not re.fullmatch(r"[\w+.-]*", text, re.ASCII) or text.startswith(("-", ".")) or not text:
        raise InputError(
            f"{where} holds {shown(value)}, which cannot be part of the name and the files of stage `{stage}`: use "
            "letters, digits, `_`, `.`, `+` and `-`."
        )


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
