"""params.yaml and dvc.yaml, read to plain values; what is wrong with them is one sentence."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent

from trimtab.errors import InputError
from trimtab.validation import nearest_of, shown

NAME = re.compile(r"[\w.@-]{1,80}")


def parse_yaml(text: str) -> Any:
    """YAML 1.2, as DVC reads and writes it: there 1e-05 is a number, which YAML 1.1 takes for a string. Of its values
    only null, true and false, numbers, strings, lists and mappings are taken, each written where it stands.

    Raises InputError, which says what is wrong in which line.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _PlainComposer
    try:
        return yaml.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        problem = error.problem or error.context or "it cannot be read"
        raise InputError(f"{line}{_sentence(problem)}") from None
    except RecursionError:
        raise InputError("its lists or mappings are nested too deeply.") from None
    except Exception as error:  # numbers, dates and keys that Python itself refuses come as errors of many kinds
        raise InputError(_sentence(str(error))) from None


class _PlainComposer(Composer):
    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.parser.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, AliasEvent):
            raise InputError(f"line {line}: `*{event.anchor}` is an alias; write the value itself.")
        node = super().compose_node(parent, index)
        kind = str(node.tag).removeprefix("tag:yaml.org,2002:")
        if kind not in ("null", "bool", "int", "float", "str", "seq", "map"):
            raise InputError(f"line {line}: a value is read as `{kind}`; write a string in quotes.")
        return node


def _sentence(text: str) -> str:
    """The first line of an error's text, without what is specific to the parser."""
    first = text.strip().partition("\n")[0].partition(" with value")[0]
    return f"{first[:200].rstrip('.')}."


def read_yaml(path: Path, remedy: str) -> dict[str, Any]:
    """A file that holds a mapping of names. Raises InputError in one sentence for a file that is missing, is not
    UTF-8, is not YAML or holds something else; `remedy` says what to do then."""
    try:
        content = _parsed(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path.name} is missing in {path.parent}: {remedy}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is not UTF-8 text (byte {error.start}): {remedy}.") from None
    except IsADirectoryError:
        raise InputError(f"{path.name} in {path.parent} is a folder: {remedy}.") from None
    except InputError as error:
        raise InputError(f"{path.name} is not valid YAML, {str(error).rstrip('.')}: mend it, or {remedy}.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path.name} does not hold a mapping of names to values: {remedy}.")
    check_names(content, path.name)
    return content


def check_names(content: Mapping[Any, Any], where: str) -> None:
    """Raise InputError for a key that is no string, or no name that a sentence could hold."""
    for key in content:
        if not isinstance(key, str):
            raise InputError(f"{where} has the key {shown(key)}, which is not a string: put it in quotes.")
        if not NAME.fullmatch(key):
            raise InputError(f"{where} has the key {shown(key)}, which is no name: use letters, digits and _.")


@lru_cache(maxsize=8)
def _parsed(text: str) -> Any:
    return parse_yaml(text)


def read_parameters(root: Path) -> dict[str, Any]:
    """All sections of params.yaml."""
    return read_yaml(root / "params.yaml", "compose it with `trimtab compose`")


def read_sections(path: Path, sections: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The named sections of params.yaml. Raises InputError for a missing file, broken YAML or an unknown section."""
    return sections_of(read_parameters(path.parent), sections)


def sections_of(content: Mapping[str, Any], sections: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The named sections. Raises InputError for one that is missing, or is no mapping of strings to values."""
    for section in sections:
        if section not in content:
            raise InputError(f"params.yaml has no section `{section}`{nearest(section, content)}")
        if not isinstance(content[section], dict):
            raise InputError(
                f"Section `{section}` of params.yaml must be a mapping of keys, not {shown(content[section])}."
            )
        check_names(content[section], f"Section `{section}`")
    return {section: content[section] for section in sections}


def nearest(key: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: what was probably meant, or all there is."""
    names = [str(each) for each in known]
    if meant := nearest_of(key, names, "; did you mean `{}`?"):
        return meant
    rest = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"; it has {', '.join(f'`{each}`' for each in names[:12]) or 'nothing'}{rest}."
