"""The command line: run a notebook as a stage, fetch inputs, report, look into records, compose a scale, copy, add."""

import io
import locale
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

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
    from trimtab.pipeline.parameters import literal, pairs
    from trimtab.pipeline.run import run_notebook

    code = run_notebook(
        notebook,
        record or Path("records") / notebook.name,
        root=_root(),
        sections=section or [],
        settings={name: literal(name, value) for name, value in pairs(set, "--set").items()},
        outputs={name: Path(value) for name, value in pairs(out, "--out").items()},
        cell_timeout=cell_timeout,
    )
    _note(f"the notebook failed, its record {record or Path('records') / notebook.name} says where" if code else None)
    raise typer.Exit(code)


@app.command()
def fetch(
    section: Annotated[str, typer.Option(help="Section of params.yaml that names model and texts.")] = "fetch",
) -> None:
    """Fetch weights and raw texts into data/model and data/text."""
    from trimtab.pipeline.check import check
    from trimtab.pipeline.fetch import fetch_section
    from trimtab.pipeline.sections import read_sections

    root = _root()
    os.chdir(root)  # local sources are named from there
    check(root, [section])
    fetch_section(read_sections(root / "params.yaml", [section])[section], root / "data")
    _note(None)


@app.command()
def check() -> None:
    """Check every section of params.yaml against every stage, before any work."""
    from trimtab.pipeline.check import check as check_all

    check_all(_root())
    typer.echo("params.yaml fits every stage.")


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
    target: Annotated[Path, typer.Argument(help="Folder to make; an earlier copy is brought up to date.")],
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


@app.command()
def why() -> None:
    """Say, in a sentence for each stage, why the last `dvc repro` failed."""
    from trimtab.pipeline.failures import failures

    for stage, told in failures(_root()).items():
        typer.echo(f"{stage}: {told}")


def main() -> None:
    """Entry point: bad input, and a disk that is full or closed, is one sentence, not a traceback. Run by DVC as a
    stage, it ends when DVC does, and remembers for `trimtab why` what went wrong."""
    _in_utf8()
    # nbformat imports jsonschema, and that, where it is installed, a grammar of international addresses, which takes
    # two seconds to build at every start. Notebooks have no such addresses to check.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows ASCII alone must not end a run
            stream.reconfigure(errors="backslashreplace")
    if "DVC_STAGE" in os.environ:
        from trimtab.pipeline.kernel import end_with_dvc

        end_with_dvc()
    try:
        app()
    except InputError as error:
        _fail(str(error))
    except OSError as error:
        from trimtab.files import disk_trouble

        trouble = disk_trouble(error)
        if trouble is None:
            raise
        _fail(trouble)


def _in_utf8() -> None:
    """Start this process anew in Python's UTF-8 mode where the locale knows less: without it no path with an umlaut
    can be opened, and libraries read files in the locale's encoding."""
    known = {sys.getfilesystemencoding().lower(), locale.getpreferredencoding(False).lower()}
    if known != {"utf-8"} and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _fail(sentence: str) -> NoReturn:
    _note(sentence)
    typer.echo(f"trimtab: {sentence}", err=True)
    sys.exit(2)


def _note(sentence: str | None) -> None:
    if "DVC_STAGE" in os.environ:
        from trimtab.pipeline.failures import note

        note(_root(), sentence)


def _root() -> Path:
    from trimtab.pipeline.root import project_root

    return project_root()
