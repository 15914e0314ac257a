"""Whatever encoding the machine's locale has, files are UTF-8 and names keep their letters."""

import ast
import json
import shutil
from collections.abc import Iterator

import pytest
import yaml

from tests.pipeline.toy import call, make
from trimtab.pipeline.records import read_record

ASCII = ("env", "LC_ALL=C", "PYTHONUTF8=0", "PYTHONCOERCECLOCALE=0", "PYTHONIOENCODING=")
PARAMETERS = 'wort: str = "x"\nmaß: float = 1.0\nout: str = "out"\nresults: str = "results.json"'
WORK = """
import sys
from pathlib import Path
from trimtab.files import atomic, write_json
print(f"Größe {wort} ✓")
print("gemeldet: groß", file=sys.stderr)
assert maß == 2.5
with atomic(Path(out)) as partial:
    partial.mkdir(parents=True)
    with open(partial / "größe.txt", "w") as file:  # as a notebook of somebody's own may
        file.write(wort)
write_json(Path(results), {"metrics": {"größe": len(wort), "wort": wort}, "claims": []})
"""
OTHERS = {"os", "zipfile", "tarfile", "archive", "bz2", "gzip", "webbrowser", "Image", "wave"}
"""What has an `open` that is not that of text files."""


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "Größe ✓ prüfen"
    make(folder, PARAMETERS, WORK)
    parameters = {"toy": {"wort": "Übermaß ✓", "maß": 2.5}}
    (folder / "params.yaml").write_text(yaml.safe_dump(parameters, allow_unicode=True), encoding="utf-8")
    return folder


def test_a_notebook_runs_to_a_good_record_where_the_locale_knows_ascii_alone(project):
    run = yaml.safe_load((project / "dvc.yaml").read_text(encoding="utf-8"))["stages"]["toy"]["cmd"].split()
    for command in (["trimtab", "check"], run, ["trimtab", "records", "list"]):
        done = call(project, *ASCII, *command)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    record = read_record(project / "records/toy.ipynb")
    assert record.metadata.trimtab.parameters["wort"] == "Übermaß ✓"
    assert [cell.outputs[0].text for cell in record.cells if cell.get("outputs")] == ["Größe Übermaß ✓ ✓\n"]
    assert "gemeldet: groß" in (project / "records/toy.log").read_text(encoding="utf-8")
    results = json.loads((project / "data/results/toy.json").read_text(encoding="utf-8"))
    assert results["metrics"] == {"größe": 9, "wort": "Übermaß ✓"}
    assert (project / "data/toy/größe.txt").read_text(encoding="utf-8") == "Übermaß ✓"


def test_an_error_that_holds_umlauts_is_told_where_the_locale_knows_ascii_alone(project):
    done = call(project, *ASCII, "trimtab", "run", "notebooks/größer.ipynb", "--out", "out=data/toy")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("trimtab: ")
    assert "Traceback" not in done.stderr


def test_scales_compose_where_the_locale_knows_ascii_alone(root, project):
    shutil.copytree(root / "conf", project / "conf")
    done = call(project, *ASCII, "trimtab", "compose", "--scale", "smoke", "--output", "größe.yaml")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((project / "größe.yaml").read_text(encoding="utf-8"))["base"]["scale"] == "smoke"


def in_the_encoding_of_the_locale(tree: ast.AST) -> Iterator[int]:
    """Lines of the calls that read or write text and do not say in which encoding; ruff's PLW1514 sees fewer."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(given.arg == "encoding" for given in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {each.arg: each.value.value for each in node.keywords if isinstance(each.value, ast.Constant)}
        first = [each.value if isinstance(each, ast.Constant) else None for each in node.args]
        match name:
            case "read_text":
                bare = not node.args
            case "write_text":
                bare = len(node.args) < 2
            case "open" if isinstance(node.func, ast.Name):
                bare = "b" not in (first[1:2] or [given.get("mode", "r")])[0]
            case "open" if ast.unparse(node.func.value) not in OTHERS:
                bare = "b" not in str((first[:1] or [given.get("mode", "r")])[0] or "b")
            case _:
                bare = any(given.get(key) is True for key in ("text", "universal_newlines"))
        if bare:
            yield node.lineno


@pytest.mark.parametrize("folder", ["lib", "notebooks", "benchmarks", "tests"])
def test_no_file_is_read_or_written_in_the_encoding_of_the_locale(root, folder):
    found = []
    for path in sorted((root / folder).rglob("*.*")):
        if path.suffix in (".py", ".ipynb"):
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".ipynb":
                cells = json.loads(text)["cells"]
                text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
            found += [f"{path.relative_to(root)}:{line}" for line in in_the_encoding_of_the_locale(ast.parse(text))]
    assert not found


@pytest.mark.parametrize(
    ("bare", "call"),
    [
        (True, "p.read_text()"), (True, "p.write_text(x)"), (True, "open(p)"), (True, "open(p, 'w')"),
        (True, "p.open()"), (True, "p.open('a')"), (True, "p.open(mode='w')"), (True, "run(c, text=True)"),
        (False, "p.read_text(encoding='utf-8')"), (False, "p.write_text(x, 'utf-8')"), (False, "open(p, 'rb')"),
        (False, "p.open('rb')"), (False, "p.open(mode='wb')"), (False, "archive.open(member)"), (False, "run(c)"),
    ],
)  # fmt: skip
def test_the_search_for_such_calls_finds_them_and_no_others(bare, call):
    assert bool(list(in_the_encoding_of_the_locale(ast.parse(call)))) == bare
