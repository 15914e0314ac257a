"""A record as a page: verdicts, parameters and provenance first, code folded, outputs that cannot act."""

import base64
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

from trimtab.claims import Verdict, verdict_table
from trimtab.markup import escaped
from trimtab.pipeline.archive import Filed
from trimtab.pipeline.records import KERNEL, title_of
from trimtab.pipeline.site.calm import calm_html, calm_markdown, inline, seen
from trimtab.pipeline.site.parameters import Annotated

LONGEST_LINE = 2_000
"""Characters of a line of an output that are shown."""
LONGEST_OUTPUT = 200_000
"""Characters of an output that are shown at all."""
TEXTS = ("name", "text", "statistic", "rule", "n", "control")
"""Fields of a verdict that are text."""
PICTURES = {"image/png": b"\x89PNG\r\n\x1a\n", "image/jpeg": b"\xff\xd8\xff"}
"""Kinds of pictures, with what each begins with."""
SHOWN = ("text/html", "text/markdown", "text/plain", "image/png", "image/jpeg")


def page_of(filed: Filed, annotated: Annotated) -> NotebookNode:
    """The notebook that the site's builder renders."""
    cells = [cell for cell in filed.cells().cells if "parameters" not in cell.metadata.get("tags", [])]
    head = new_markdown_cell("\n\n".join(_head(filed, annotated)))
    if not cells or title_of(NotebookNode(cells=cells[:1])) is None:  # a page needs a title
        cells = [new_markdown_cell(f"# {inline(filed.title)}"), *cells]
    notebook = nbformat.v4.new_notebook(cells=[cells[0], head, *map(_cell, cells[1:])])
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    return notebook


def badge(outcome: str) -> str:
    """A verdict, coloured, and readable without colours."""
    return f'<span class="verdict {outcome.replace(" ", "-")}">{outcome}</span>'


def plainly(verdict: Verdict) -> Verdict:
    """With all of its text fit for Markdown."""
    texts: dict[str, Any] = {key: inline(str(getattr(verdict, key))) for key in TEXTS}
    return dataclasses.replace(verdict, **texts)


def _head(filed: Filed, annotated: Annotated) -> list[str]:
    parts = []
    if filed.verdicts:
        parts.append(
            f":::{{container}} wide\n{verdict_table([plainly(each) for each in filed.verdicts.values()])}\n:::"
        )
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
    told = re.findall(r"`(\w+)`", made.get("notebook", "").partition("sections")[2])
    sections = filed.about.get("sections", told)
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
        calm.data = NotebookNode()
        for kind, data in output.data.items():
            if kind in SHOWN and isinstance(data, str) and (shown := _shown(kind, data)):
                calm.data["text/html" if kind == "text/markdown" else kind] = shown
        calm.metadata = NotebookNode()
    else:
        calm.traceback = [_text(line) for line in output.get("traceback", [])]
    return calm


def _shown(kind: str, data: str) -> str:
    """Empty: it cannot be shown."""
    if start := PICTURES.get(kind):
        try:
            return data if base64.b64decode(data, validate=False).startswith(start) else ""
        except ValueError:
            return ""
    if kind == "text/plain":
        return _text(data)
    return calm_markdown(_kept(data)) if kind == "text/markdown" else calm_html(_kept(data))


def _text(text: str) -> str:
    return _kept("\n".join(map(_line, text.split("\n"))))


def _line(line: str) -> str:
    shown = seen(line[:LONGEST_LINE])
    return shown if len(line) <= LONGEST_LINE else f"{shown} … {len(line) - LONGEST_LINE:,} characters more"


def _kept(text: str) -> str:
    cut = len(text) - LONGEST_OUTPUT
    return text if cut <= 0 else f"{text[:LONGEST_OUTPUT]}\n… {cut:,} characters more, in the record itself"
