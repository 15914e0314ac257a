"""Records are JSON for every parser, equal between equal runs, known when altered, and made in linear time."""

import copy
import json
from pathlib import Path

import nbformat
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from rich.console import Console

from trimtab.errors import InputError
from trimtab.pipeline.archive import Filed
from trimtab.pipeline.differences import Difference, render, summary
from trimtab.pipeline.execution import Execution
from trimtab.pipeline.records import is_altered, make_record, parse_record, read_record, signed, write_record
from trimtab.pipeline.site.display import page_of
from trimtab.pipeline.site.parameters import Annotated

ROOT = Path("/home/somebody/project")
CLAIM = {
    "name": "c", "text": "It works", "statistic": "ratio", "rule": "above 0", "outcome": "held",
    "effect": 0.5, "low": 0.25, "high": None, "n": "3 seeds", "control": "",
}  # fmt: skip
PROVENANCE = "| | |\n|---|---|\n| commit | `0123` |\n| wall time | 12 s |"


def made(*outputs, root=ROOT, **given) -> nbformat.NotebookNode:
    cells = [new_markdown_cell("# A toy"), new_code_cell("1", execution_count=1)]
    notebook = new_notebook(cells=cells)
    notebook.cells[1].outputs = copy.deepcopy(list(outputs))
    about = {
        "root": root, "source": "notebooks/toy.ipynb", "parameters": {"lr": 0.5}, "record": "toy", "sections": ["toy"],
        "results": {"metrics": {"rows": 3, "arm": {"k=2": 0.5}}, "claims": [CLAIM]},
        "library": {"lib/trimtab/x.py": "1"},
        "outputs": {"out": {"path": "data/toy", "sha256": "0" * 64}},
    }  # fmt: skip
    return make_record(Execution(notebook), PROVENANCE, **about | given)


def shown(*outputs, **given) -> list:
    return made(*outputs, **given).cells[-1].outputs


def display(**data):
    return new_output("display_data", data={key.replace("_", "/", 1): value for key, value in data.items()})


def raw(kind: str, **given) -> nbformat.NotebookNode:
    """An output as a kernel may send it, valid or not."""
    return nbformat.NotebookNode(output_type=kind, **given)


def html(text: str) -> str:
    return shown(display(text_html=text))[0].data["text/html"]


def text(text: str, name: str = "stdout") -> str:
    return shown(new_output("stream", name=name, text=text))[0].text


def strict(path: Path) -> dict:
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_bytes().decode("utf-8"), parse_constant=refuse)


# JSON


def test_whatever_is_in_outputs_the_record_is_strict_json_and_reads_back_as_it_was(tmp_path):
    deep = current = []
    for _ in range(200):
        current.append([])
        current = current[0]
    unbounded = {"z": [float("nan"), float("inf"), (1, 2)], 3: b"\xff"}
    record = made(
        raw("display_data", data={"application/x+json": unbounded}, metadata={"a": float("-inf")}),
        raw("stream", name="stdout", text="half \ud800 a pair\n"),
        raw("display_data", data={"application/y+json": deep}, metadata={}),
        raw("display_data", data={"text/plain": 5}, metadata={}),
        parameters={"lr": float("nan"), "pair": (1, 2)},
    )
    path = tmp_path / "toy.ipynb"
    write_record(record, path)
    cell = strict(path)["cells"][-1]
    assert cell["outputs"][0]["data"]["application/x+json"]["z"] == [None, None, [1, 2]]
    assert cell["outputs"][1]["text"] == ["half \\ud800 a pair\n"]
    assert "no valid output: application/y+json" in str(cell["outputs"][2])
    assert strict(path)["metadata"]["trimtab"]["parameters"] == {"lr": None, "pair": [1, 2]}
    assert read_record(path) == record
    assert not is_altered(read_record(path))


def test_a_record_says_what_it_is_of_and_its_digest_comes_last(tmp_path):
    about = made().metadata["trimtab"]
    assert list(about)[-1] == "digest"
    assert about["format"] == 2
    assert about["library"] == {"lib/trimtab/x.py": "1"}
    assert about["outputs"]["out"]["path"] == "data/toy"
    assert made() == made()


# What is taken for altered, or for no record at all


def changed(edit) -> str:
    record = json.loads(nbformat.writes(made(new_output("stream", text="found 3\n"))))
    edit(record)
    return json.dumps(record)


ALTERED = {
    "cells": lambda r: r["cells"][-1].update(outputs=[]),
    "source": lambda r: r["cells"][0].update(source="# Another"),
    "metrics": lambda r: r["metadata"]["trimtab"]["results"]["metrics"].update(rows=4),
    "claims": lambda r: r["metadata"]["trimtab"]["results"]["claims"][0].update(outcome="not held"),
    "parameters": lambda r: r["metadata"]["trimtab"]["parameters"].update(lr=0.75),
    "provenance gone": lambda r: r["cells"].pop(1),
    "library": lambda r: r["metadata"]["trimtab"].update(library={}),
    "digest": lambda r: r["metadata"]["trimtab"].update(digest="0" * 64),
}  # fmt: skip
BROKEN = {
    "empty": lambda r: r["metadata"].update(trimtab={}),
    "list": lambda r: r["metadata"].update(trimtab=[]),
    "text": lambda r: r["metadata"].update(trimtab="x"),
    "null": lambda r: r["metadata"].update(trimtab=None),
    "no status": lambda r: r["metadata"]["trimtab"].pop("status"),
    "no digest": lambda r: r["metadata"]["trimtab"].pop("digest"),
    "status": lambda r: r["metadata"]["trimtab"].update(status="perhaps"),
    "format": lambda r: r["metadata"]["trimtab"].update(format="2"),
    "format true": lambda r: r["metadata"]["trimtab"].update(format=True),
    "format null": lambda r: r["metadata"]["trimtab"].update(format=None),
    "format below": lambda r: r["metadata"]["trimtab"].update(format=-1),
    "parameters": lambda r: r["metadata"]["trimtab"].update(parameters=[1]),
    "results": lambda r: r["metadata"]["trimtab"].update(results=3),
    "metrics": lambda r: r["metadata"]["trimtab"]["results"].update(metrics=[]),
    "claims": lambda r: r["metadata"]["trimtab"]["results"].update(claims=[{"name": "c"}]),
    "more claims": lambda r: r["metadata"]["trimtab"]["results"]["claims"][0].update(extra=1),
    "effect": lambda r: r["metadata"]["trimtab"]["results"]["claims"][0].update(effect="0.5"),
    "outputs": lambda r: r["metadata"]["trimtab"].update(outputs={"out": "data/toy"}),
    "cells gone": lambda r: r.pop("cells"),
    "cells": lambda r: r.update(cells=[3]),
    "outputs null": lambda r: r["cells"][-1].update(outputs=[None]),
    "tags": lambda r: r["cells"][1]["metadata"].update(tags=5),
    "metadata": lambda r: r.update(metadata=[]),
    "nbformat": lambda r: r.update(nbformat="4"),
    "minor": lambda r: r.update(nbformat_minor=None),
}  # fmt: skip


@pytest.mark.parametrize("name", ALTERED)
def test_a_record_that_still_reads_is_known_to_be_altered(name):
    assert is_altered(parse_record(changed(ALTERED[name]), "toy.ipynb"))


@pytest.mark.parametrize("name", BROKEN)
def test_a_record_that_is_none_any_more_is_refused_in_one_sentence(name):
    with pytest.raises(InputError, match=r"^toy\.ipynb (has been altered|is not a notebook).*[^\n]\.$"):
        parse_record(changed(BROKEN[name]), "toy.ipynb")


@pytest.mark.parametrize(
    "content",
    ["", "null", "3", "[]", "{", '{"nbformat": 4, "nbformat": 4}', "[" * 100_000, "\ufeff{}", '{"a": NaN}', "1e999",
     '{"a": ' * 3000 + "1" + "}" * 3000, '{"nbformat": 4, "x": ' + "[" * 400 + "]" * 400 + "}", "9" * 10_000],
)  # fmt: skip
def test_text_that_is_no_notebook_is_refused_in_one_sentence(content):
    with pytest.raises(InputError, match=r"toy\.ipynb is not a notebook that nbformat can read"):
        parse_record(content, "toy.ipynb")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "toy.ipynb").write_bytes(b"\xff\xfe{")
    with pytest.raises(InputError, match="no text"):
        read_record(tmp_path / "toy.ipynb")
    with pytest.raises(InputError, match="is missing"):
        read_record(tmp_path / "toy.ipynb/other.ipynb")


def test_records_of_format_1_are_still_read():
    def edit(record):
        about = record["metadata"]["trimtab"]
        about["format"] = 1
        for key in ("record", "sections", "outputs", "library", "digest"):
            del about[key]

    record = parse_record(changed(edit), "toy.ipynb")
    assert not is_altered(record)
    assert Filed("toy", record).verdicts["c"].effect == 0.5


def paths(value, here=()):
    yield here
    if isinstance(value, dict):
        for key in value:
            yield from paths(value[key], (*here, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from paths(item, (*here, index))


GOOD = json.loads(nbformat.writes(made(new_output("stream", text="found 3\n"), display(text_html="<b>x</b>"))))
PLACES = [path for path in paths(GOOD) if path]
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(PLACES), st.none() | st.tuples(JUNK)), min_size=1, max_size=3), st.booleans())
def test_nothing_that_is_changed_in_a_record_crashes_what_reads_it(edits, sign):
    """With its digest mended, too: it is then as odd as a record can be that passes for one."""
    record = copy.deepcopy(GOOD)
    for path, value in edits:
        parent = record
        try:
            for key in path[:-1]:
                parent = parent[key]
            if value is None:
                del parent[path[-1]]
            else:
                parent[path[-1]] = value[0]
        except (KeyError, IndexError, TypeError):
            continue
    told = ""
    try:
        read = parse_record(json.dumps(record), "toy")
    except InputError as error:
        told = str(error)
    assert "\n" not in told
    if told:
        return
    read = signed(read) if sign and "digest" in read.metadata["trimtab"] else read
    before, after = Filed("good", parse_record(json.dumps(GOOD), "good")), Filed("toy", read)
    console = Console(width=100)
    with console.capture():
        console.print(summary(after))
        console.print(render(Difference(before, after)))
    page_of(after, Annotated({}, {}))
