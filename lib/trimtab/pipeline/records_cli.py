"""`trimtab records`: which there are, what one says, how two differ, and whether they can be believed."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.errors import InputError
from trimtab.pipeline.root import project_root

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(no_args_is_help=True, help=__doc__)
Which = Annotated[str, typer.Argument(help="A record: its name as in `list`, a file, or REVISION:NAME.")]


@app.command("list")
def list_records() -> None:
    """Every stage's record: its state, its claims, and where it comes from."""
    from rich.table import Table
    from rich.text import Text

    from trimtab.markup import visible
    from trimtab.pipeline.archive import Filed, find
    from trimtab.pipeline.conditions import conditions

    root = project_root()
    table = Table("record", "state", "claims", "commit", "wall time")
    for each in conditions(root):
        if each.record is None:
            continue
        filed: Filed | None = None
        if each.has_record(root):
            try:
                filed = find(root, each.record)
            except InputError:
                filed = None  # its state says so
        outcomes = Counter(verdict.outcome for verdict in filed.verdicts.values()) if filed else Counter()
        claims = ", ".join(f"{outcomes[key]} {key}" for key in ("held", "not held", "inconclusive") if outcomes[key])
        made = filed.provenance if filed else {}
        commit = made.get("commit", "").replace("`", "")
        row = (each.record, each.state, claims, commit, made.get("wall time", ""))
        table.add_row(*(Text(visible(cell)) for cell in row))
    _console().print(table)


@app.command()
def show(record: Which) -> None:
    """One record's provenance, claims and metrics."""
    from trimtab.pipeline.archive import find
    from trimtab.pipeline.differences import summary

    _console().print(summary(find(project_root(), record)))


@app.command()
def diff(
    record: Which,
    other: Annotated[str | None, typer.Argument(help="What it is compared with [the same name now].")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page instead.")] = None,
) -> None:
    """Two records by parameters, claims, metrics and cells; of one name alone the last commit's and today's."""
    from trimtab.pipeline.archive import find
    from trimtab.pipeline.differences import Difference, is_page, page, render

    root = project_root()
    name = record.rpartition(":")[2]
    before, after = (record, other) if other else (record if ":" in record else f"HEAD:{record}", name)
    difference = Difference(find(root, before), find(root, after))
    if html:
        from trimtab.files import atomic

        with atomic(html, own=is_page) as partial:
            partial.write_text(page(difference), encoding="utf-8")
    else:
        _console().print(render(difference))


@app.command()
def verify(
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte of outputs and of DVC's cache anew.")] = False,
) -> None:
    """Whether every record is what its run wrote, and was made from what is here: names those that are not."""
    from trimtab.markup import visible
    from trimtab.pipeline.conditions import conditions

    root = project_root()
    found = conditions(root, deep=deep)
    for name in sorted(_names(root) - {each.record for each in found}):
        told = f"records/{name}.ipynb belongs to no stage: its notebook was renamed, or its arm is no longer run."
        typer.echo(visible(told))
    for each in found:
        if each.state != "fresh":
            typer.echo(visible(f"{each.stage}: {each.state}: {'; '.join(each.reasons)}"))
    others = sum(each.state != "fresh" for each in found)
    typer.echo(f"{len(found) - others} of {len(found)} stages are fresh.")
    raise typer.Exit(1 if others else 0)


def _names(root: Path) -> set[str]:
    records = root / "records"
    return {str(path.relative_to(records).with_suffix("")) for path in records.rglob("*.ipynb")}


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False)
