"""What parameters mean, and what they are by default: from the comments of conf/config.yaml and its default scale."""

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trimtab.pipeline.scales import compose

DEFAULT_SCALE = "laptop"
_SECTION = re.compile(r"^(\w+):\s*$")
_KEY = re.compile(r"^  (\w+):[^#]*(?:#\s*(.*))?$")
_SAME = re.compile(r"\$\{([\w.]+)\}")
_COMMENT = re.compile(r"^  #\s*(.*)$")


@dataclass(frozen=True)
class Annotated:
    """Sections of parameters, as {section: {parameter: ...}}."""

    defaults: Mapping[str, Mapping[str, Any]]
    meanings: Mapping[str, Mapping[str, str]]

    @classmethod
    def of(cls, root: Path) -> "Annotated":
        """Read conf/ of a checkout."""
        with tempfile.TemporaryDirectory() as folder:
            composed = Path(folder) / "params.yaml"
            compose(root, composed, DEFAULT_SCALE)
            defaults = yaml.safe_load(composed.read_text(encoding="utf-8"))
        return cls(defaults, comments((root / "conf/config.yaml").read_text(encoding="utf-8")))


def comments(text: str) -> dict[str, dict[str, str]]:
    """Of each parameter the comment behind it, else those on the lines before it, else whose value it takes."""
    found: dict[str, dict[str, str]] = {}
    section = ""
    before: list[str] = []
    for line in text.splitlines():
        if match := _SECTION.match(line):
            section, before = match.group(1), []
        elif match := _COMMENT.match(line):
            before.append(match.group(1))
        elif match := _KEY.match(line):
            alike = _SAME.search(line)
            meaning = match.group(2) or " ".join(before) or (f"as {alike.group(1)}" if alike else "")
            found.setdefault(section, {})[match.group(1)] = meaning
            before = []
    return found
