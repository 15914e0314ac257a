"""Outputs of an executed notebook without what differs between two equal runs: addresses, random names, paths of this
machine, progress bars, widgets. Every pattern takes time linear in the text, whatever the text."""

import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from trimtab.pipeline.bars import ANSI, settled, without_bars
from trimtab.pipeline.results import plain_text

WIDGET = "application/vnd.jupyter.widget-view+json"
DEEPEST = 90
"""Levels of an output that are kept; a record may have a few more."""
_MARKUP = ("text/html", "image/svg+xml", "text/markdown")
_BINARY = ("application/pdf", "application/octet-stream")
_ADDRESS = re.compile(r"(?<= at )0x[0-9a-f]{6,16}(?![0-9a-zA-Z])")
_CELL_FILE = re.compile(r"ipykernel_\d{1,12}/\d{1,24}\.py")
_DATA_URI = re.compile(r"data:(?:[\w-]{1,40}/[\w.+-]{1,80})?(?:;[\w.+=-]{1,80}){0,4},[^\s\"'<>)]*")
_DATE = re.compile(r"<dc:date>[^<]*</dc:date>\s{0,40}")
_ID = re.compile(r"\bid\s{0,4}=\s{0,4}[\"']?([\w.:-]{1,120})")
_RANDOM = re.compile(
    r"(?<![0-9A-Za-z])(?:[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|T_[0-9a-f]{5,32}(?![0-9a-zA-Z])"
    r"|[0-9a-f]{32}(?![0-9A-Za-z])|[pmh][0-9a-f]{10}(?![0-9A-Za-z]))"
)
"""Names as plotly, pandas' Styler, Altair and matplotlib's SVG make them up for elements."""
_NOTEBOOK_BAR = re.compile(r"HBox\(children=\(HTML\(.{0,400}(?:Float|Int)Progress\(", re.DOTALL)


class Cleaner:
    """Cleans the outputs of one record; random names get numbers in the order in which they first appear in it."""

    def __init__(self, root: Path) -> None:
        self.names: dict[str, str] = {}
        # Longest first: the environment usually lies inside the root, and the root inside the home.
        named = {sys.prefix: "<env>", sys.base_prefix: "<python>", os.environ.get("HOME", ""): "~"}
        named |= {str(root.resolve()): ".", str(root): "."}
        self.places = [
            (re.compile(re.escape(place) + r"(?![\w~+-]|[.@]\w)"), place, named[place])
            for place in sorted(named, key=len, reverse=True)
            if len(place) > 1 and place.startswith("/")
        ]

    def outputs(self, found: list[NotebookNode]) -> list[NotebookNode]:
        """The outputs of one cell."""
        return [clean for each in _merge_streams(found) if (clean := self._output(each)) is not None]

    def text(self, text: str) -> str:
        """Without paths of this machine and without addresses, but for those inside data URIs."""
        parts, end = [], 0
        for uri in _DATA_URI.finditer(text) if "data:" in text else ():
            parts += [self._text(text[end : uri.start()]), uri[0]]
            end = uri.end()
        return "".join([*parts, self._text(text[end:])])

    def _output(self, output: NotebookNode) -> NotebookNode | None:
        output.pop("transient", None)
        data = output.get("data", {})
        if output.output_type == "stream":
            text = plain_text(output.text)
            text = settled(without_bars(text, fresh=output.name == "stderr")[0])
            if output.name == "stderr":  # its empty lines are often those after bars
                text = "\n".join(line for line in text.split("\n") if ANSI.sub("", line).strip())
                text += "\n" if text else ""
            output.text = self.text(text)
            return output if text else None
        if WIDGET in data:
            del data[WIDGET]
            if not data or (set(data) == {"text/plain"} and _is_bar(data["text/plain"])):
                return None
        for kind, value in data.items():
            if kind in _MARKUP and isinstance(value, str):
                data[kind] = self._renamed(_DATE.sub("", value))
        try:
            output = plain({key: self._walk(value, key) for key, value in output.items()})
        except RecursionError:
            return _instead(output)
        return output if _is_valid(output) else _instead(output)

    def _walk(self, value: Any, key: str = "", depth: int = 0) -> Any:
        if depth > DEEPEST:
            raise RecursionError
        if isinstance(value, str):
            return value if _is_binary(key) else self.text(plain_text(value))
        if isinstance(value, list | tuple):
            return [self._walk(item, key, depth + 1) for item in value]
        if isinstance(value, Mapping):
            return {k: self._walk(v, str(k), depth + 1) for k, v in value.items()}
        return value

    def _text(self, text: str) -> str:
        text = "".join(_without_cell_files(text))
        for pattern, place, name in self.places:
            if place in text:
                text = pattern.sub(lambda m, name=name: name if _begins(m) else m[0], text)  # type: ignore[misc]
        return _ADDRESS.sub(lambda m: "0x…" if _in_repr(m) else m[0], text) if "0x" in text else text

    def _renamed(self, text: str) -> str:
        """Elements that were given a random name get one that counts."""
        for found in _ID.finditer(text):
            if (random := _RANDOM.search(found[1])) and random[0] not in self.names:
                kind = next(start for start in ("T_", "p", "m", "h", "") if random[0].startswith(start))
                self.names[random[0]] = f"{kind or 'name-'}{len(self.names) + 1:05d}"
        return _RANDOM.sub(lambda m: self.names.get(m[0], m[0]), text) if self.names else text


def plain(value: Any) -> Any:
    """What every JSON parser reads: NaN and infinity become None, keys and halves of surrogate pairs text."""
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return NotebookNode({plain_text(str(key)): plain(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int) else plain_text(str(value))


def _merge_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """How stdout and stderr are cut and interleaved is a matter of timing: between other outputs, join each in turn."""
    merged: list[NotebookNode] = []
    group: dict[str, list[NotebookNode]] = {}

    def flush() -> None:
        for _, parts in sorted(group.items(), reverse=True):
            parts[0].text = "".join(part.text for part in parts)
            merged.append(parts[0])
        group.clear()

    for output in outputs:
        if output.output_type == "stream":
            group.setdefault(output.name, []).append(output)
        else:
            flush()
            merged.append(output)
    flush()
    return merged


def _is_binary(kind: str) -> bool:
    return kind in _BINARY or (kind.startswith(("image/", "audio/", "video/")) and kind != "image/svg+xml")


def _is_bar(text: Any) -> bool:
    """Whether a widget's text is that of a bar of tqdm, as notebooks have it."""
    if not isinstance(text, str):
        return False
    kept, bars = without_bars("\r" + text)
    return bool(bars and not kept.strip()) or _NOTEBOOK_BAR.match(text) is not None


def _is_valid(output: NotebookNode) -> bool:
    try:
        nbformat.validate(output, ref="output", version=4, version_minor=5)
    except nbformat.ValidationError:
        return False
    return True


def _instead(output: Mapping[str, Any]) -> NotebookNode:
    """In place of what no notebook may hold."""
    kinds = ", ".join(map(str, output.get("data", {}))) or str(output.get("output_type"))
    return nbformat.v4.new_output("display_data", data={"text/plain": plain_text(f"[no valid output: {kinds}]")})


def _without_cell_files(text: str) -> Iterator[str]:
    """`<cell>` in place of the files that IPython says cells come from, which lie under the kernel's TMPDIR."""
    end, temporary = 0, f"{tempfile.gettempdir()}/"
    for found in _CELL_FILE.finditer(text):
        start = max(end, found.start() - len(temporary))
        if text.startswith(temporary, start):  # there may be spaces in it
            yield text[end:start] + "<cell>"
            end = found.end()
            continue
        start = found.start()
        while start > end and not (text[start - 1].isspace() or text[start - 1] in "\"'<>()=\x1b"):
            start -= 1
        slash = text.find("/", start, found.start())
        if slash >= 0:
            yield text[end:slash] + "<cell>"
            end = found.end()
    yield text[end:]


def _begins(found: re.Match[str]) -> bool:
    """Whether a path of this machine begins there, rather than being the end or the middle of something else."""
    text, start = found.string, found.start()
    before = text[max(0, start - 16) : start]
    if not before or not re.search(r"[\w.~/+=-]\Z", before):
        return True
    if before.endswith("="):  # of an option or a variable, or of base64, which only ends with it
        return True
    escaped = re.search(r"(?<!\\)\\[nrt]\Z|\x1b\[[0-9;?]*[A-Za-z]\Z|\s-[A-Z]\Z|://\Z", before)
    return escaped is not None


def _in_repr(found: re.Match[str]) -> bool:
    """Whether an address stands in angle brackets, as in `<function f at 0x7f...>`."""
    text, start, end = found.string, found.start(), found.end()
    if text.startswith((">", "&gt;"), end):
        return True
    before, after = text[max(0, start - 200) : start].replace("&lt;", "<").replace("&gt;", ">"), text[end : end + 400]
    return before.rfind("<") > before.rfind(">") and (">" in after or "&gt;" in after)
