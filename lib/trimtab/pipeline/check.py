"""Every section of params.yaml against every stage of dvc.yaml, before any work: what does not fit is one sentence.

Keys and types are those of the notebooks' parameters cells, ranges those of the configuration classes that a notebook
names in `stage.configure(...)`: each parameter is declared once. What sections must have in common: `trimtab.rules`.
"""

import ast
import hashlib
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from trimtab.code import python_of
from trimtab.errors import InputError
from trimtab.files import read_json, write_json
from trimtab.pipeline.base import BaseConfig
from trimtab.pipeline.inputs import INPUTS, refuse_links
from trimtab.pipeline.parameters import Declared, configure, fit, parse_notebook
from trimtab.pipeline.sections import check_names, read_parameters, sections_of
from trimtab.pipeline.stages import Stage, stages
from trimtab.rules import check_rules

PARAMETERS = "params.yaml"
STAMP = Path(".dvc", "tmp", "trimtab-check.json")
"""Under the root: the digest of what was found right last."""


@dataclass(frozen=True)
class Source:
    """What a stage's notebook takes."""

    declared: Declared
    configurations: tuple[type, ...]


def check(root: Path, sections: Sequence[str] = ()) -> None:
    """Raise InputError for the first thing in params.yaml, dvc.yaml and the local inputs that cannot work.

    What was found right is not looked into again while files and library are the same. `sections` may be there without
    a stage that takes them, for a notebook that is run by hand.
    """
    digest = _digest(root)
    try:
        known = read_json(root / STAMP)
        found = (known["local"], known["unused"]) if known["digest"] == digest else None
    except (InputError, KeyError, TypeError):
        found = None
    if found is None:
        needed = any(stage.sections or stage.params for stage in stages(root, filled=False))
        found = check_parameters(read_parameters(root) if needed or (root / PARAMETERS).exists() else {}, root)
        if (root / STAMP).parent.is_dir():
            write_json(root / STAMP, {"digest": digest, "local": found[0], "unused": found[1]})
    local, unused = found
    for path in local:
        if not (root / path).exists():
            raise InputError(f"{path}, which params.yaml names, does not exist: put it there, or name another.")
        refuse_links(root / path, root)
    for section in unused:
        if section not in sections:
            raise InputError(f"Section `{section}` of params.yaml is taken by no stage of dvc.yaml: remove it.")


def check_parameters(parameters: Mapping[str, Any], root: Path) -> tuple[list[str], list[str]]:
    """The same for parameters at hand: (local inputs that they name, sections that no stage takes)."""
    check_names(parameters, "params.yaml")
    sections_of(parameters, list(parameters))
    definitions = stages(root, filled=False)
    for stage in definitions:
        _check_sections(stage, sections_of(parameters, stage.sections), root)
    used = {p.split(".")[0] for stage in definitions for p in (*stage.sections, *stage.params)}
    taken = {section: parameters[section] for section in used if section in parameters}
    local = list(_local_inputs(taken))
    check_rules(taken)
    for stage in stages(root, parameters):
        _check_command(stage, sections_of(parameters, stage.sections), root)
    return local, [section for section in parameters if used and section not in used]


def _check_sections(stage: Stage, sections: Mapping[str, Mapping[str, Any]], root: Path) -> None:
    """What a stage takes of params.yaml."""
    for section in stage.sections if stage.params else []:
        if section not in stage.params:
            raise InputError(f"dvc.yaml: `params` of stage `{stage.name}` lacks `{section}`, which `cmd` takes.")
    if stage.notebook is not None:
        source = _source(root, stage)
        later = [*stage.settings, *stage.outputs]
        for key in later:
            source.declared.require(key, f"stage `{stage.name}` of dvc.yaml")
        values = fit(source.declared, sections, {}, later=later)
        for kind in source.configurations:
            if not _names(kind) & set(stage.settings):
                configure(kind, values, sections)
    elif stage.sections:
        from trimtab.pipeline.fetch import FETCH, FetchConfig

        configure(FetchConfig, fit(FETCH, sections, {}), sections)


def _check_command(stage: Stage, sections: Mapping[str, Mapping[str, Any]], root: Path) -> None:
    """What a stage takes of its own line of dvc.yaml."""
    if stage.notebook is None:
        return
    source, where = _source(root, stage), f"stage `{stage.name}` of dvc.yaml"
    given = {**stage.settings, **stage.outputs}
    values = {key: source.declared.fitting(key, value, where) for key, value in given.items()}
    for name, path in stage.outputs.items():
        if stage.outs and path not in stage.outs:
            raise InputError(f"dvc.yaml: `outs` of stage `{stage.name}` lack {path}, the --out {name} of its `cmd`.")
    for kind in source.configurations:
        if _names(kind) & set(stage.settings):
            held = {key: value for section in sections.values() for key, value in section.items()}
            configure(kind, held | values, sections)


def _names(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


def _source(root: Path, stage: Stage) -> Source:
    name = str(stage.notebook)
    try:
        return _read((root / name).read_text(encoding="utf-8"), name)
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{name}, which stage `{stage.name}` of dvc.yaml runs, cannot be read: mend `cmd`.") from None


@lru_cache(maxsize=64)
def _read(text: str, name: str) -> Source:
    notebook = parse_notebook(text, name)
    kinds = list(_configurations([cell.source for cell in notebook.cells if cell.cell_type == "code"], name))
    declared = Declared.of(notebook, name, [_names(kind) for kind in kinds])
    if declared.whole:
        kinds.append(BaseConfig)
    return Source(declared, tuple(kind for kind in kinds if _names(kind) <= set(declared.parameters)))


def _configurations(cells: Sequence[str], name: str) -> Iterator[type]:
    """The classes that a notebook gives to `stage.configure`, found through its imports; classes of its own cells are
    left to it."""
    imported: dict[str, tuple[str, str | None]] = {}
    for cell in cells:
        try:
            tree = ast.parse(python_of(cell))
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            match node:
                case ast.ImportFrom(module=str(module), level=0):
                    imported |= {each.asname or each.name: (module, each.name) for each in node.names}
                case ast.Import():
                    imported |= {each.asname: (each.name, None) for each in node.names if each.asname}
                case ast.Call(func=ast.Attribute(attr="configure"), args=[ast.Name() | ast.Attribute() as given]):
                    first, *rest = ast.unparse(given).split(".")
                    if first in imported:
                        kind = _imported(*imported[first], rest, name)
                        if isinstance(kind, type) and is_dataclass(kind):
                            yield kind


def _imported(module: str, attribute: str | None, rest: Sequence[str], name: str) -> Any:
    try:
        try:
            found: Any = importlib.import_module(f"{module}.{attribute}" if attribute else module)
        except ModuleNotFoundError as error:
            if not str(error.name).startswith(module):
                raise
            found = getattr(importlib.import_module(module), str(attribute))
        for each in rest:
            found = getattr(found, each)
    except (ImportError, AttributeError) as error:
        asked = ".".join(filter(None, (module, attribute, *rest)))
        raise InputError(f"{name} takes its configuration from {asked}, which cannot be imported: {error}.") from None
    return found


def _local_inputs(parameters: Mapping[str, Any]) -> Iterator[str]:
    """Paths under the root that sections name as inputs. Raises InputError for one outside the folder that DVC watches
    for its kind."""
    fetch, steering = parameters.get("fetch", {}), parameters.get("steering", {})
    named = [("fetch", key, "fetch", each) for key in ("model", "encoder", "texts") for each in _listed(fetch.get(key))]
    tasks = ("task", "held_out", "other_tasks")
    named += [
        ("steering", key, "questions", each)
        for key in tasks
        for each in _listed(steering.get(key))
        if Path(each).suffix in (".jsonl", ".parquet")
    ]
    for section, key, kind, text in named:
        if text.startswith(("package:", "hub:")):
            continue
        folder, path = INPUTS / kind, Path(text)
        if path.is_absolute() or ".." in path.parts or not path.is_relative_to(folder) or path == folder:
            raise InputError(
                f"`{key}` of section `{section}` names {text!r:.100}, which is no package: and no hub: source: a local "
                f"input must be moved to {folder}/, where its changes are noticed, and be named from there."
            )
        yield text


def _listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value] if value else []


def _digest(root: Path) -> str:
    """Digest of all that a check reads: parameters, stages, notebooks, and the library."""
    library = {*Path(__file__).parents[1].rglob("*.py"), *root.glob("lib/**/*.py")}
    pipeline = _bytes(root / "dvc.yaml")
    notebooks = {root / name.decode() for name in re.findall(rb"[\w./-]+\.ipynb", pipeline)}
    found = hashlib.sha256()
    for path in (root / PARAMETERS, root / "dvc.yaml", *sorted(notebooks), *sorted(library)):
        if "records" not in path.parts:
            found.update(hashlib.sha256(str(path).encode() + b"\0" + _bytes(path)).digest())
    return found.hexdigest()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
