"""What differs between two records: parameters, claims, metrics, and cells."""

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from trimtab.claims import Verdict
from trimtab.markup import visible
from trimtab.pipeline.archive import Filed, effect_of

ABSENT = "·"
"""In place of what one of the two has not."""
PAGE = "<!-- written by `trimtab records diff` -->"
"""The first line of a page."""


@dataclass(frozen=True)
class Change:
    """Something that two records have differently, or one has and the other has not (None)."""

    name: str
    before: Any
    after: Any


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """What differs, in the order in which it stands."""
    names = list(dict.fromkeys([*before, *after]))
    return [
        Change(name, before.get(name), after.get(name))
        for name in names
        if (name in before, before.get(name)) != (name in after, after.get(name))
    ]


@dataclass(frozen=True)
class Difference:
    """Two records, side by side."""

    before: Filed
    after: Filed

    @property
    def unknowing(self) -> list[str]:
        """Records that do not hold their parameters and results: of these only cells are compared."""
        return [each.label for each in (self.before, self.after) if not each.knows]

    @property
    def parameters(self) -> list[Change]:
        return [] if self.unknowing else changes(self.before.parameters, self.after.parameters)

    @property
    def claims(self) -> list[Change]:
        return [] if self.unknowing else changes(self.before.verdicts, self.after.verdicts)

    @property
    def metrics(self) -> list[Change]:
        return [] if self.unknowing else changes(self.before.metrics, self.after.metrics)

    @cached_property
    def cells(self) -> str:
        """What `Filed.cells` differs in, as nbdime prints it. Empty: nothing."""
        # A terminal's tool: it imports half of Jupyter's server.
        from nbdime import diff_notebooks
        from nbdime.prettyprint import PrettyPrintConfig, pretty_print_notebook_diff

        one, other = self.before.cells(), self.after.cells()
        found = diff_notebooks(one, other)
        if not found:
            return ""
        out = io.StringIO()
        config = PrettyPrintConfig(out=out, use_color=False, use_git=False, use_diff=False)
        pretty_print_notebook_diff(self.before.label, self.after.label, one, found, config)
        return "\n".join(out.getvalue().splitlines()[3:])  # without which files

    def __bool__(self) -> bool:
        return bool(self.parameters or self.claims or self.metrics or self.cells)


def summary(filed: Filed) -> RenderableType:
    """One record: its title, provenance, claims and metrics."""
    about = Table.grid(padding=(0, 2))
    for name, value in filed.provenance.items():
        about.add_row(Text(name), Text(visible(value.replace("`", "")), overflow="fold"))
    parts: list[RenderableType] = [Text(visible(filed.title), style="bold"), *_altered(filed), about]
    if filed.verdicts:
        claims = Table("claim", "verdict", title="Claims", title_justify="left", title_style="bold")
        for verdict in filed.verdicts.values():
            claims.add_row(Text(visible(verdict.text)), Text(visible(_verdict(verdict))))
        parts.append(claims)
    if filed.metrics:
        metrics = Table("metric", "value", title="Metrics", title_justify="left", title_style="bold")
        for name, value in filed.metrics.items():
            metrics.add_row(Text(visible(name)), Text(visible(_value(value))))
        parts.append(metrics)
    return Group(*parts)


def render(difference: Difference) -> RenderableType:
    """For a terminal or, by way of rich, a page. Nothing that a model wrote can act on either."""
    before, after = (visible(each.label) for each in (difference.before, difference.after))
    parts = [*_altered(difference.before), *_altered(difference.after)]
    if not difference:
        return Group(*parts, Text(f"{before} and {after} are the same but for provenance."))
    if difference.unknowing:
        which = " and ".join(difference.unknowing)
        parts.append(Text(visible(f"Only cells are compared: {which} does not hold parameters and results yet.")))
    if difference.parameters:
        parts.append(_table("Parameters", before, after, map(_numbers, difference.parameters)))
    if difference.claims:
        rows = ((_text(c), _verdict(c.before), _verdict(c.after), "") for c in difference.claims)
        parts.append(_table("Claims", before, after, rows))
    if difference.metrics:
        parts.append(_table("Metrics", before, after, map(_numbers, difference.metrics)))
    if cells := difference.cells:
        parts += [Text("\nCells", style="bold"), Group(*map(_line, cells.splitlines()))]
    return Group(*parts)


def page(difference: Difference, width: int = 140) -> str:
    """`render` as one HTML file that asks nothing of any other."""
    console = Console(record=True, file=io.StringIO(), width=width, force_terminal=False)
    console.print(render(difference))
    return f"{PAGE}\n{console.export_html(inline_styles=True)}"


def is_page(path: Path) -> bool:
    """Whether a file is one that `page` made, and may be replaced."""
    with path.open("rb") as file:
        return file.read(len(PAGE)) == PAGE.encode()


def _altered(filed: Filed) -> list[RenderableType]:
    told = f"{filed.label} has been altered since its run: its digest does not fit."
    return [Text(visible(told), style="red")] if filed.altered else []


def _table(title: str, before: str, after: str, rows: Iterable[tuple[str, str, str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in (title.lower(), before, after, "change"):
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(each)) for each in row))
    return table


def _numbers(change: Change) -> tuple[str, str, str, str]:
    return change.name, _value(change.before), _value(change.after), _by(change)


def _text(change: Change) -> str:
    verdict = change.after or change.before
    return str(verdict.text)


def _verdict(verdict: Verdict | None) -> str:
    if verdict is None:
        return ABSENT
    return f"{verdict.outcome}: {effect_of(verdict)}, {verdict.rule}"


def _value(value: Any) -> str:
    if value is None:
        return ABSENT
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _by(change: Change) -> str:
    numbers = [change.before, change.after]
    if any(isinstance(each, bool) or not isinstance(each, int | float) for each in numbers):
        return ""
    try:
        before, after = map(float, numbers)
    except OverflowError:  # of an integer beyond floats
        return ""
    return f"{after - before:+.3g}" + (f" ({(after - before) / abs(before):+.1%})" if before else "")


def _line(line: str) -> Text:
    style = {"+": "green", "-": "red", "#": "bold"}.get(line[:1], "")
    return Text(visible(line).replace("⇥", "    "), style=style)
