"""What fits a notebook is injected, and nothing else."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from trimtab.errors import InputError
from trimtab.pipeline.parameters import collect, declared_parameters, literal
from trimtab.pipeline.sections import parse_yaml, read_sections

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


def test_the_command_line_goes_before_a_section_and_two_sections_do_not_share_a_key():
    assert take({"lr": 1.0, "steps": 2}, {"lr": 2.0}) == {"lr": 2.0, "steps": 2}
    with pytest.raises(InputError, match="`lr` comes from section `a` and from section `b`: keep one for toy"):
        collect(notebook(), "toy.ipynb", {"a": {"lr": 1.0}, "b": {"lr": 1.0}}, {"lr": 2.0})
    for given, message in (
        ({"lrr": 2.0}, "`lrr` of the command line is no parameter"),
        ({"lr": "no"}, "it takes float"),
    ):
        with pytest.raises(InputError, match=message):
            take({}, given)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("no", "no"), ("on", "on"), ("[1, 2]", [1, 2]), ("null", None), ("", None)],
)
def test_values_of_the_command_line_are_read_as_those_of_params_yaml(text, value):
    assert literal("lr", text) == value
    assert parse_yaml(f"lr: {text}") == {"lr": value}


@pytest.mark.parametrize("text", ["[", "*a", "&a [*a]", "!!python/name:os", "2020-01-01", "!x 1", "{1: 2, 1: 3}", "\0"])
def test_what_is_no_plain_value_is_refused_on_the_command_line(text):
    with pytest.raises(InputError, match=r"`lr` of the command line is .*, no YAML value: .*") as caught:
        literal("lr", text)
    assert "\n" not in str(caught.value)


UNMEANT = [float("inf"), [[float("nan")]], 2**60, 1e300, 10**5000, "a\0b", "\ud800", {1: 2}, {"a": [2**70]}]


@pytest.mark.parametrize("number", range(len(UNMEANT)))
def test_values_that_cannot_be_meant_are_refused_however_deep(number):
    toy = notebook("a: dict = {}\nb = None\nc: list = []")
    for key in "abc":
        with pytest.raises(InputError, match=f"`{key}` of section `toy` is .*, which does not fit") as caught:
            collect(toy, "toy.ipynb", {"toy": {key: UNMEANT[number]}}, {})
        assert len(str(caught.value)) < 250


BEGUN = [new_code_cell("stage = notebook.begin(globals())")]


def test_a_stage_takes_no_quick_default_but_the_paths_of_its_inputs_and_outputs():
    stage = notebook('a: int = 1\nb: str = ""\nseed: int = 0\nmodel: str = "data/model"\nout: str = "scratch/x"')
    assert collect(stage, "toy.ipynb", {"toy": {"a": 1}}, {}) == {"a": 1}, "a notebook that is no stage"
    stage.cells += BEGUN
    given = {"base": {"seed": 1}, "toy": {"a": 1, "b": ""}}
    assert collect(stage, "toy.ipynb", given, {}) == {"a": 1, "b": "", "seed": 1}
    for section, key in (("base", "seed"), ("toy", "a"), ("toy", "b")):
        fewer = {name: {k: v for k, v in values.items() if k != key} for name, values in given.items()}
        with pytest.raises(InputError, match=f"Section `{section}` lacks `{key}`, which toy.ipynb needs: (int|str)"):
            collect(stage, "toy.ipynb", fewer, {})
        assert collect(stage, "toy.ipynb", fewer, {key: given[section][key]})[key] == given[section][key]
    with pytest.raises(InputError, match=r"The command line lacks `a`, which toy\.ipynb needs"):
        collect(stage, "toy.ipynb", {}, {})


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
    path.write_text("corpus: {a: 1}\nsae: {b: 2}\n", encoding="utf-8")
    assert read_sections(path, ["sae"]) == {"sae": {"b": 2}}
    with pytest.raises(InputError, match="has no section `copus`; did you mean `corpus`"):
        read_sections(path, ["copus"])
    path.write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(InputError, match="does not hold a mapping"):
        read_sections(path, ["a"])
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="is a folder: compose it"):
        read_sections(path, ["a"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "is not valid YAML, line 1: "),
        (b"a: {x: 1}\nb: \xe9", "is not UTF-8 text"),
        (b"a: {x: 1}\na: {x: 2}", 'is not valid YAML, line 2: found duplicate key "a"'),
        (b"a: &x {y: 1}\nb: *x", "line 2: `\\*x` is an alias; write the value itself"),
        (b"a: {y: !!binary aGk=}", "line 1: a value is read as `binary`; write a string in quotes"),
        (b"a: {y: 2026-01-02}", "line 1: a value is read as `timestamp`"),
        (b"a: {y: !!python/object:os.system x}", "line 1: "),
        (b"a: " + b"[" * 5000, "nested too deeply"),
        (b"a: {y: " + b"9" * 5000 + b"}", "is not valid YAML, Exceeds the limit"),
        (b"a: {y: 1}\n\x00", "is not valid YAML"),
        (b"", "does not hold a mapping"),
        (b"1: {y: 1}", "has the key 1, which is not a string"),
        (b"a: {1: x}", "Section `a` has the key 1, which is not a string"),
        (b'a: {"x\\ny": 1}', "Section `a` has the key .*, which is no name"),
        (b"? " + b"k" * 500 + b"\n: {y: 1}", "has the key .*, which is no name"),
        (b"a: 3", "Section `a` of params.yaml must be a mapping of keys, not 3"),
        (b"a:", "Section `a` of params.yaml must be a mapping of keys, not None"),
    ],
    ids=range(17),
)
def test_a_file_that_holds_no_sections_is_told_in_one_sentence(tmp_path, content, message):
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_sections(tmp_path / "params.yaml", ["a"])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["size", "nfiles"])
def test_a_name_that_dvc_does_not_see_is_refused_in_a_section_and_not_on_the_command_line(name):
    toy = notebook(f"{name}: int = 1")
    with pytest.raises(InputError, match=f"`{name}` of section `toy`: DVC's run cache takes no notice"):
        collect(toy, "toy.ipynb", {"toy": {name: 2}}, {})
    assert collect(toy, "toy.ipynb", {}, {name: 2}) == {name: 2}
