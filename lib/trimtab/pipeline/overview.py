"""The pipeline at a glance, for the notebook that a user starts with: its map, coloured by state, and its stages."""

import html
from collections.abc import Sequence
from pathlib import Path

from trimtab.markup import escaped
from trimtab.pipeline.conditions import Condition, State
from trimtab.pipeline.site.graph import of_pipeline, stages_of, svg
from trimtab.pipeline.stages import stages

COLOURS: dict[State, str] = {
    "fresh": "#0072B2",
    "stale": "#E69F00",
    "never run": "#999999",
    "missing": "#999999",
    "of another commit": "#CC79A7",
    "failed": "#D55E00",
    "altered": "#D55E00",
}
"""Of boxes and of words, least urgent first."""


def picture(root: Path, found: Sequence[Condition]) -> str:
    """The map as HTML; a box for stages of one name has the colour of the most urgent."""
    edges, counts = of_pipeline(stages_of(root))
    urgency = list(COLOURS)
    worst: dict[str, State] = {}
    for each in found:
        name = each.stage.partition("@")[0]
        worst[name] = max(worst.get(name, "fresh"), each.state, key=urgency.index)
    rules = [
        ".overview svg {width: 100%}",
        ".overview path {fill: none; stroke: #888; stroke-width: 1.2}",
        ".overview text {fill: #fff; font: 15px sans-serif}",
        *(f".overview .{_class(state)} rect {{fill: {colour}}}" for state, colour in COLOURS.items()),
    ]
    drawn = svg(edges, counts, {}, {name: _class(state) for name, state in worst.items()})
    return f'<style>{" ".join(rules)}</style><div class="overview">{drawn}</div>'


def table(root: Path, found: Sequence[Condition], above: str = "../../") -> str:
    """Every stage as a row of HTML: its state and what is to be done, and links to its notebook and to its record.
    `above`: from the reader's folder to the repository's root."""
    sources = sources_of(root)
    rows = []
    for each in found:
        name = each.stage.partition("@")[0]
        state = f'<b style="color: {COLOURS[each.state]}; white-space: nowrap">{each.state}</b>'
        links = [_link(above, sources[name], "notebook")] if name in sources else []
        if each.has_record(root):
            links.append(_link(above, f"records/{each.record}.ipynb", "record"))
        cells = (f"<code>{html.escape(each.stage)}</code>", state, " · ".join(links), _what(each))
        rows.append("".join(f'<td style="text-align: left">{cell}</td>' for cell in cells))
    head = "".join(f'<th style="text-align: left">{name}</th>' for name in ("stage", "state", "open", "to be done"))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def sources_of(root: Path) -> dict[str, str]:
    """Of each stage, without the part behind @, the notebook that it runs."""
    return {each.name.partition("@")[0]: each.notebook for each in stages(root) if each.notebook}


def _what(each: Condition) -> str:
    if each.state == "fresh":
        return ""
    told = () if each.state in ("never run", "missing", "of another commit") else each.reasons  # the command says it
    reasons = escaped("; ".join(told[:2]) + (" ..." if len(told) > 2 else ""))
    return f'<code style="white-space: nowrap">{html.escape(each.command)}</code> &nbsp; {reasons}'


def _link(above: str, path: str, text: str) -> str:
    return f'<a href="{html.escape(above + path)}">{text}</a>'


def _class(state: str) -> str:
    return state.replace(" ", "-")
