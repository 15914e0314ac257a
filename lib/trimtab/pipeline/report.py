"""records/README.md, and the claims in README.md: what the executed notebooks found, from their records."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trimtab.claims import Verdict, verdict_table
from trimtab.errors import InputError
from trimtab.files import atomic, read_json
from trimtab.pipeline.archive import Filed, find
from trimtab.pipeline.normalising import plain
from trimtab.pipeline.records import Results
from trimtab.pipeline.stages import stages

TITLE = "# Records"
"""First line of the page."""
FIGURE_TAG = "figure"
"""Tag of the cell whose picture stands for the record."""
MARKS = ("<!-- claims, written by `trimtab report` -->", "<!-- end of claims -->")
"""Between them a page has the table of claims."""


@dataclass(frozen=True)
class Entry:
    """One stage: its record, and its results from their file (a record's metadata is sorted: k=16 before k=2)."""

    filed: Filed
    results: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Path under records/ without suffix, such as `sae/topk-8`."""
        return self.filed.label

    @property
    def verdicts(self) -> list[Verdict]:
        """In the order in which they were judged."""
        return [Verdict(**claim) for claim in self.results["claims"]]


def write_report(root: Path, output: Path, figures: Path, names: Sequence[str]) -> None:
    """Render the named records, and put their claims between the `MARKS` of README.md, where it has
    them. Raises InputError for a failed or missing record."""
    entries = [read_entry(root, name) for name in names]
    with atomic(figures) as folder:
        folder.mkdir(parents=True)
        pictures = {entry.name: picture for entry in entries if (picture := _save_figure(entry, folder))}
    with atomic(output, own=_is_report) as partial:
        partial.write_text("\n".join(_render(entries, pictures, figures.name)) + "\n", encoding="utf-8")
    if (root / "README.md").is_file():
        _put_claims(root / "README.md", _claims(entries))


def current_records(root: Path) -> list[str]:
    """Names of the records that the pipeline, as params.yaml has it now, declares: in the order of dvc.yaml.

    Files that another scale or an older list of arms left behind are not among them.
    """
    named = [Path(each.record).with_suffix("") for each in stages(root) if each.record]
    return [str(path.relative_to("records")) for path in named if path.is_relative_to("records")]


def read_entry(root: Path, name: str) -> Entry:
    """records/NAME.ipynb with data/results/NAME.json. Raises InputError where they are of a failed run, have been
    altered, or do not belong together."""
    filed, path = find(root, name), root / "data/results" / f"{name}.json"
    if filed.about["status"] != "complete":
        raise InputError(f"records/{name}.ipynb is the record of a failed run: run its stage again before reporting.")
    if filed.altered:
        raise InputError(
            f"records/{name}.ipynb has been altered since its run: `dvc checkout` it, or run its stage again."
        )
    results = read_json(path)
    try:
        Results.model_validate(results)
        if not {"metrics", "claims"} <= set(results):
            raise InputError(f"{path} has no `metrics` or no `claims`: run its stage again.")
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise InputError(f"{path} has been altered: `{where}` is not what a run writes; run its stage again.") from None
    if filed.about.get("results") and plain(results) != plain(filed.about["results"]):
        raise InputError(f"{path} is not what records/{name}.ipynb says that its run found: `dvc checkout` both.")
    return Entry(filed, results)


def _is_report(page: Path) -> bool:
    return page.read_text(encoding="utf-8", errors="replace").startswith(TITLE) or not page.stat().st_size


def _claims(entries: list[Entry]) -> str:
    verdicts = [verdict for entry in entries for verdict in entry.verdicts]
    return verdict_table(verdicts) if verdicts else "No stage has judged a claim yet."


def _put_claims(page: Path, table: str) -> None:
    before, begin, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if end:
        with atomic(page) as partial:
            partial.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")


def _render(entries: list[Entry], pictures: Mapping[str, str], folder: str) -> Iterator[str]:
    yield f"{TITLE}\n"
    yield (
        "Written by the `report` stage from the executed notebooks; do not edit. The notebooks themselves are in "
        "the DVC cache: after `dvc repro` the links below open them.\n"
    )
    yield "## Claims\n"
    yield _claims(entries)
    yield ""
    judged = [entry for entry in entries if entry.verdicts]
    for entry in [*judged, *(entry for entry in entries if not entry.verdicts)]:
        yield from _render_entry(entry, pictures.get(entry.name), folder)


def _render_entry(entry: Entry, picture: str | None, folder: str) -> Iterator[str]:
    source = entry.filed.about["notebook"]
    row = entry.filed.provenance
    yield f"## {entry.filed.title} · `{entry.name}`\n"
    yield f"[record]({entry.name}.ipynb) · [source](../{source}) · commit {row.get('commit', 'unknown')}"
    yield f"· {row.get('wall time', '?')} · {row.get('peak memory', '?')}\n"
    if picture:
        yield f"![{entry.filed.title}]({folder}/{picture})\n"
    yield from _metric_tables(entry.results["metrics"])
    yield f"Parameters: {row.get('parameters', '')}\n"
    yield f"Made with {row.get('versions', '')}; on {row.get('hardware', '')}.\n"


def _metric_tables(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Single numbers as a list; groups of numbers as one table for all groups with the same keys."""
    single = {name: value for name, value in metrics.items() if not isinstance(value, Mapping)}
    if single:
        yield "| metric | value |\n|---|---|"
        yield from (f"| {_cell(name)} | {_number(value)} |" for name, value in single.items())
        yield ""
    tables: dict[tuple[str, ...], list[tuple[str, Mapping[str, Any]]]] = {}
    for name, group in metrics.items():
        if isinstance(group, Mapping):
            tables.setdefault(tuple(group), []).append((name, group))
    for columns, rows in tables.items():
        yield f"| | {' | '.join(map(_cell, columns))} |\n|---|{'---|' * len(columns)}"
        yield from (f"| {_cell(name)} | {' | '.join(_number(row[c]) for c in columns)} |" for name, row in rows)
        yield ""


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else _cell(str(value))


def _cell(text: str) -> str:
    """Text that stays within its cell of a table."""
    return " ".join(text.replace("|", "\\|").split())


def _save_figure(entry: Entry, folder: Path) -> str | None:
    for cell in entry.filed.record.cells:
        if FIGURE_TAG in cell.metadata.get("tags", []):
            for output in cell.get("outputs", []):
                png = output.get("data", {}).get("image/png")
                if isinstance(png, str) and (picture := base64.b64decode(png, validate=False)):
                    name = f"{entry.name.replace('/', '-')}.png"
                    (folder / name).write_bytes(picture)
                    return name
    return None
