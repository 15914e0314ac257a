"""A record as a page: verdicts, parameters and provenance first, code folded, outputs that cannot act."""

import re
from collections.abc import Mapping
from typing import Any

import nbformat
import nh3
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

from trimtab.claims import verdict_table
from trimtab.markup import escaped, visible
from trimtab.pipeline.archive import Filed
from trimtab.pipeline.site.parameters import Annotated

LONGEST_LINE = 2_000
"""Characters of a line of an output that are shown."""
LONGEST_OUTPUT = 300_000
"""Characters of an output that are shown at all."""
SHOWN = ("text/html", "text/markdown", "text/plain", "image/png", "image/jpeg")
STYLES = {
    *("background", "background-color", "color", "border", "border-radius", "padding", "margin", "text-align", "width"),
    *(
        "font-weight",
        "font-size",
        "font-family",
        "white-space",
        "vertical-align",
        "opacity",
        "overflow-wrap",
        "display",
    ),
}
"""What an output may say of its looks; none of them moves it out of its place."""


def page_of(filed: Filed, annotated: Annotated) -> NotebookNode:
    """The notebook that the site's builder renders."""
    title, *cells = [cell for cell in filed.cells().cells if "parameters" not in cell.metadata.get("tags", [])]
    head = new_markdown_cell("\n\n".join(_head(filed, annotated)))
    notebook = nbformat.v4.new_notebook(cells=[title, head, *map(_cell, cells)])
    notebook.metadata = nbformat.from_dict({"kernelspec": filed.record.metadata["kernelspec"]})
    return notebook


def badge(outcome: str) -> str:
    """A verdict, coloured, and readable without colours."""
    return f'<span class="verdict {outcome.replace(" ", "-")}">{outcome}</span>'


def _head(filed: Filed, annotated: Annotated) -> list[str]:
    parts = []
    if filed.verdicts:
        parts.append(f":::{{container}} wide\n{verdict_table(list(filed.verdicts.values()))}\n:::")
    made = filed.provenance
    commit, time, memory = (made.get(key, "?").replace("`", "") for key in ("commit", "wall time", "peak memory"))
    rows = "".join(
        f"<tr><th>{escaped(key)}</th><td>{escaped(value.replace('`', ''))}</td></tr>"
        for key, value in made.items()
        if key != "parameters"
    )
    about = f"Provenance: commit {escaped(commit)}, {escaped(time)}, {escaped(memory)}"
    parts.append(
        f"<details class=provenance><summary>{about}</summary><div class=wide><table>{rows}</table></div></details>"
    )
    sections = re.findall(r"`(\w+)`", made.get("notebook", "").partition("sections")[2])
    defaults, meanings = (
        {key: value for section in sections for key, value in kind.get(section, {}).items()}
        for kind in (annotated.defaults, annotated.meanings)
    )
    parts.append(_parameters(filed.parameters, defaults, meanings))
    return parts


def _parameters(found: Mapping[str, Any], defaults: Mapping[str, Any], meanings: Mapping[str, str]) -> str:
    changed = [key for key, value in found.items() if key in defaults and defaults[key] != value]
    rows = "".join(
        f"<tr class={'changed' if key in changed else 'default'}><th><code>{escaped(key)}</code></th>"
        f"<td><code>{escaped(repr(value))}</code></td>"
        f"<td>{escaped(repr(defaults[key])) if key in changed else ''}</td>"
        f"<td>{escaped(meanings.get(key, ''))}</td></tr>"
        for key, value in found.items()
    )
    told = f"{len(changed)} other than by default: {', '.join(changed)}" if changed else "all as by default"
    heads = "".join(f"<th>{name}</th>" for name in ("parameter", "value", "by default", "meaning"))
    return (
        f"<details class=parameters><summary>{len(found)} parameters, {escaped(told)}</summary>"
        f"<div class=wide><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


def _cell(cell: NotebookNode) -> NotebookNode:
    shown = NotebookNode(cell)
    if cell.cell_type == "code":
        shown.metadata = NotebookNode({"tags": ["hide-input"]})
        shown.outputs = [_calm(output) for output in cell.outputs]
    return shown


def _calm(output: NotebookNode) -> NotebookNode:
    """What a page can show of an output, at a length that a browser can bear, with nothing hidden in it."""
    calm = NotebookNode(output)
    if output.output_type == "stream":
        calm.text = _text(output.text)
    elif "data" in output:
        calm.data = NotebookNode({kind: _shown(kind, data) for kind, data in output.data.items() if kind in SHOWN})
        calm.metadata = NotebookNode()
    return calm


def _shown(kind: str, data: str) -> str:
    if kind in ("image/png", "image/jpeg"):
        return data
    if kind == "text/plain":
        return _text(data)
    attributes = nh3.ALLOWED_ATTRIBUTES | {
        "*": {"style", "class", "title"},
        "td": {"colspan"},
        "th": {"colspan"},
    }
    data = _kept("\n".join(map(_seen, data.split("\n"))))
    # Nothing that loads or leads: pictures are outputs of their own.
    tags = nh3.ALLOWED_TAGS - {"a", "area", "img", "map"}
    return nh3.clean(data, tags=tags, attributes=attributes, filter_style_properties=STYLES)


def _text(text: str) -> str:
    return _kept("\n".join(map(_line, text.split("\n"))))


def _seen(line: str) -> str:
    return visible(line).replace("⇥", "\t")


def _line(line: str) -> str:
    shown = _seen(line[:LONGEST_LINE])
    return shown if len(line) <= LONGEST_LINE else f"{shown} … {len(line) - LONGEST_LINE:,} characters more"


def _kept(text: str) -> str:
    cut = len(text) - LONGEST_OUTPUT
    return text if cut <= 0 else f"{text[:LONGEST_OUTPUT]}\n… {cut:,} characters more, in the record itself"
