"""The command line: run a notebook as a stage, fetch inputs, report, look into records, compose a scale, copy, add."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from trimtab.errors import InputError
from trimtab.pipeline.records_cli import app as records_app

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(records_app, name="records")


@app.command()
def run(
    notebook: Annotated[Path, typer.Argument(help="Source notebook, relative to the repository's root.")],
    section: Annotated[list[str] | None, typer.Option(help="Section of params.yaml to inject; repeatable.")] = None,
    out: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH of an output the notebook writes; repeatable.")
    ] = None,
    set: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of a single parameter; repeatable.")] = None,
    record: Annotated[Path | None, typer.Option(help="Executed notebook [records/NOTEBOOK].")] = None,
    cell_timeout: Annotated[int | None, typer.Option(help="Seconds that one cell may take.")] = None,
) -> None:
    """Execute a notebook with sections of params.yaml, and keep it as a record."""
    # nbformat's validator would build a grammar of IRIs, which takes a second and serves no notebook.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    from trimtab.pipeline.run import run_notebook

    code = run_notebook(
        notebook,
        record or Path("records") / notebook.name,
        root=_root(),
        sections=section or [],
        settings={name: _literal(name, value) for name, value in _pairs(set, "--set").items()},
        outputs={name: Path(value) for name, value in _pairs(out, "--out").items()},
        cell_timeout=cell_timeout,
    )
    raise typer.Exit(code)


@app.command()
def fetch(
    section: Annotated[str, typer.Option(help="Section of params.yaml that names model and texts.")] = "fetch",
) -> None:
    """Fetch weights and raw texts into data/model and data/text."""
    from trimtab.pipeline.fetch import fetch_section
    from trimtab.pipeline.parameters import read_sections

    root = _root()
    fetch_section(read_sections(root / "params.yaml", [section])[section], root / "data")


@app.command()
def report() -> None:
    """Render records/README.md, records/figures and the claims in README.md from the executed notebooks."""
    from trimtab.pipeline.report import current_records, write_report

    root = _root()
    write_report(root, root / "records/README.md", root / "records/figures", current_records(root))


@app.command()
def site(
    out: Annotated[Path, typer.Argument(help="Folder to write; replaced when it exists.")] = Path("site"),
) -> None:
    """Render the records as a static site, to be read without a network."""
    from trimtab.pipeline.report import current_records
    from trimtab.pipeline.site.build import build

    root = _root()
    build(root, root / out, current_records(root))


@app.command()
def compose(
    overrides: Annotated[list[str] | None, typer.Argument(help="Hydra overrides such as sae.steps=100.")] = None,
    scale: Annotated[str, typer.Option(help="smoke | laptop | gpu | paper.")] = "laptop",
    output: Annotated[Path, typer.Option(help="File to write.")] = Path("params.yaml"),
) -> None:
    """Compose params.yaml from conf/, as `dvc exp run -S scale=...` does."""
    from trimtab.pipeline.scales import compose as compose_params

    root = _root()
    compose_params(root, root / output, scale, overrides or [])


@app.command()
def copy(
    target: Annotated[Path, typer.Argument(help="Folder to make; replaced when it exists.")],
    scale: Annotated[str, typer.Option(help="smoke | laptop | gpu | paper.")] = "smoke",
) -> None:
    """Copy the working tree to a repository of its own, at another scale."""
    from trimtab.pipeline.scales import copy_project

    copy_project(_root(), target, scale)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Of notebook, section and stage: small letters, digits and _.")],
) -> None:
    """Add an experiment: notebook, section, stage and test, from a template that runs as it stands."""
    from trimtab.pipeline.new import add_experiment

    root = _root()
    for path in add_experiment(root, name):
        typer.echo(path.relative_to(root))
    typer.echo(f"It runs as it stands: dvc repro {name}. Now make notebooks/{name}.ipynb your own.")


def main() -> None:
    """Entry point: bad input, and a disk that is full or closed, is one sentence, not a traceback."""
    # nbformat imports jsonschema, and that, where it is installed, a grammar of international addresses, which takes
    # two seconds to build at every start. Notebooks have no such addresses to check.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    try:
        app()
    except InputError as error:
        typer.echo(f"trimtab: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        from trimtab.files import disk_trouble

        trouble = disk_trouble(error)
        if trouble is None:
            raise
        typer.echo(f"trimtab: {trouble}", err=True)
        sys.exit(2)


def _root() -> Path:
    from trimtab.pipeline.root import project_root

    return project_root()


def _pairs(given: list[str] | None, option: str) -> dict[str, Any]:
    pairs = [item.partition("=") for item in given or []]
    for name, equals, _ in pairs:
        if not equals or not name.isidentifier():
            raise InputError(f"{option} {name!r} is not NAME=VALUE.")
    return {name: value for name, _, value in pairs}


def _literal(name: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"--set {name}={value} is not a YAML value.") from None
