"""What fits a notebook is injected, and nothing else."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from trimtab.errors import InputError
from trimtab.pipeline.parameters import collect, declared_parameters, read_sections

CELL = """
# a comment
lr: float = 0.1
steps = 3
name: str = "x"
flag = False
sites: list[int] = [1]
rates = [0.1, 0.2]
limit: int | None = None
"""


def notebook(source=CELL, cells=1) -> nbformat.NotebookNode:
    return new_notebook(cells=[new_code_cell(source, metadata={"tags": ["parameters"]}) for _ in range(cells)])


def take(section, settings=None):
    return collect(notebook(), "toy.ipynb", {"toy": section}, settings or {})


def test_values_that_fit_are_taken_as_they_are():
    given = {"lr": 1, "steps": 4, "name": "y", "flag": True, "sites": [2, 3], "rates": [1, 0.5], "limit": None}
    assert take(given) == given
    assert take({"limit": 5}, {"lr": 2.5}) == {"limit": 5, "lr": 2.5}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"zzz": 1}, r"`zzz` of section `toy` is no parameter of toy\.ipynb; it has `lr`, `steps`"),
        ({"step": 1}, r"did you mean `steps`\?"),
        ({"steps": 1.5}, r"`steps` of section `toy` is 1\.5, which does not fit toy\.ipynb: .* int, by default 3"),
        ({"steps": True}, r"is True, which does not fit"),
        ({"lr": "0.1"}, r"is '0\.1', which does not fit"),
        ({"lr": float("nan")}, r"is nan, which does not fit"),
        ({"flag": 1}, r"is 1, which does not fit"),
        ({"name": 3}, r"is 3, which does not fit"),
        ({"sites": [1, "2"]}, r"list\[int\]"),
        ({"rates": ["a"]}, r"list\[float\]"),
        ({"limit": "all"}, r"int \| None"),
        ({"steps": None}, r"is None, which does not fit"),
    ],
)
def test_values_that_do_not_fit_are_named(section, message):
    with pytest.raises(InputError, match=message) as caught:
        take(section)
    assert "\n" not in str(caught.value)


def test_a_key_given_twice_is_refused():
    with pytest.raises(InputError, match="`lr` comes from section `toy` and from the command line"):
        take({"lr": 1.0}, {"lr": 2.0})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = dict(a=1)", "`x` is not a plain literal"),
        ("import os", "is not `name = literal`"),
        ("x = 1\nx = 2", "`x` is set twice"),
        ("x = (", "is not valid Python"),
        ("x: Path = 'a'", "has the annotation `Path`"),
        ("x: __import__('os').system('true') = 1", "has the annotation"),
    ],
)
def test_parameters_cells_hold_literals_only(source, message):
    with pytest.raises(InputError, match=message):
        declared_parameters(notebook(source), "toy.ipynb")


@pytest.mark.parametrize("cells", [0, 2])
def test_there_is_one_parameters_cell(cells):
    with pytest.raises(InputError, match=f"has {cells} cells tagged `parameters`"):
        declared_parameters(notebook(cells=cells), "toy.ipynb")


def test_sections_are_read_or_named(tmp_path):
    path = tmp_path / "params.yaml"
    with pytest.raises(InputError, match="is missing"):
        read_sections(path, ["a"])
    path.write_text("corpus: {a: 1}\nsae: {b: 2}\n")
    assert read_sections(path, ["sae"]) == {"sae": {"b": 2}}
    with pytest.raises(InputError, match="has no section `copus`; did you mean `corpus`"):
        read_sections(path, ["copus"])
    path.write_text("[1, 2]")
    with pytest.raises(InputError, match="does not hold sections"):
        read_sections(path, ["a"])
    path.write_text("a: [")
    with pytest.raises(InputError, match="is not valid YAML"):
        read_sections(path, ["a"])


@pytest.mark.parametrize("name", ["size", "nfiles"])
def test_a_name_that_dvc_does_not_see_is_refused_in_a_section_and_not_on_the_command_line(name):
    toy = notebook(f"{name}: int = 1")
    with pytest.raises(InputError, match=f"`{name}` of section `toy`: DVC's run cache takes no notice"):
        collect(toy, "toy.ipynb", {"toy": {name: 2}}, {})
    assert collect(toy, "toy.ipynb", {}, {name: 2}) == {name: 2}
