"""A digest of code changes with what the code does, and with nothing else; imports are followed as Python runs them."""

import json
import linecache
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest

from trimtab import code
from trimtab.code import digest, module_digests

ROOT = Path(__file__).parents[1]
PROGRAM = '''
"""A module."""
import math  # numbers

LIMIT = 1_000
"""How many."""


class Thing:
    """A thing."""

    size: int = 3

    def area(self, by: float = 2.0) -> float:
        """Its area."""
        # squared
        if by:
            return f"{self.size!r:>{LIMIT}} by " f"{by}", self.size * (by + 1)
        return None


def empty():
    pass
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""A module."""', ""),
        ('"""A module."""', '"""Another text."""'),
        ("# numbers", "# others"),
        ('"""How many."""', ""),
        ('"""Its area."""', '"""The area of it, which is\n        told at length."""'),
        ("        # squared\n", ""),
        ("1_000", "1000"),
        ("2.0", "2.00"),
        ('"{self.size!r:>{LIMIT}} by " f"{by}"', "'{self.size!r:>{LIMIT}} by {by}'"),
        ("self.size * (by + 1)", "(\n                self.size\n                * (by + 1)\n            )"),
        ("    pass\n", '    """Nothing."""\n'),
        ("    pass\n", "    ...\n"),
    ],
)
def test_comments_docstrings_and_formatting_leave_a_digest_alone(old, new):
    assert PROGRAM.count(old) == 1
    assert digest(PROGRAM.replace(old, new)) == digest(PROGRAM)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("1_000", "1_001"),
        ("1_000", "1_000.0"),
        ("1_000", "'1_000'"),
        ("1_000", "True"),
        ("2.0", "2.5"),
        ("self.size * (by + 1)", "self.size * by + 1"),
        ("self.size * (by + 1)", "self.size + (by + 1)"),
        ("if by:", "if not by:"),
        ("if by:", "while by:"),
        ("!r", "!s"),
        (" by ", " times "),
        (">{LIMIT}", "<{LIMIT}"),
        ("return None", "return False"),
        ("    pass\n", "    return 1\n"),
        ("import math", "import cmath as math"),
        ("size: int = 3", "size: float = 3"),
        ("def empty", "async def empty"),
    ],
)
def test_any_change_of_behaviour_changes_a_digest(old, new):
    assert PROGRAM.count(old) == 1
    assert digest(PROGRAM.replace(old, new)) != digest(PROGRAM)


def test_a_digest_is_the_same_under_every_python():
    """Computed once: another version that parses this otherwise fails here."""
    assert digest(PROGRAM) == "bc991bc1c9410539"


def test_what_is_no_python_is_known_by_its_text():
    assert digest("def (") != digest("def )")
    assert digest("\ud800") != digest("x\0")


@pytest.fixture
def library(tmp_path):
    """A small library `lib`, whose modules import one another in every way."""
    files = {
        "__init__.py": "",
        "a.py": "from lib.sub import b",
        "sub/__init__.py": "from .c import thing",
        "sub/b.py": "def late():\n    from .. import d",
        "sub/c.py": "thing = 1",
        "d.py": "import typing as t\nif t.TYPE_CHECKING:\n    from lib import only_types\nelse:\n    import lib.e",
        "e.py": "import importlib\ndef get():\n    return importlib.import_module('lib.f')",
        "f.py": "",
        "only_types.py": "",
        "lonely.py": "",
        "table.py": "LATER = {'f': 'lib.f'}",
        "fast/__init__.py": "import importlib\ndef get(name):\n    importlib.import_module(f'{__name__}.{name}')",
        "fast/cpu.py": "",
        "fast/gpu.py": "",
        "round_one.py": "import lib.round_two",
        "round_two.py": "import lib.round_one",
    }
    for name, text in files.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "lib"


def found(library, text, name="start.py", **options):
    start = library.parent / name
    start.write_text(text, encoding="utf-8")
    digests = module_digests(start, library=library, **options)
    return {path.removeprefix("lib/lib/").removesuffix(".py") for path in digests}


ALL_OF_A = {"__init__", "a", "sub/__init__", "sub/b", "sub/c", "d", "e", "f"}


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("import lib", {"__init__"}),
        ("import math, json", set()),
        ("import lib.f", {"__init__", "f"}),
        ("from lib import f as g", {"__init__", "f"}),
        ("from lib.sub.c import thing", {"__init__", "sub/__init__", "sub/c"}),
        ("import lib.a", ALL_OF_A),
        ("def f():\n    class A:\n        import lib.a", ALL_OF_A),
        ("try:\n    import lib.f\nexcept ImportError:\n    pass", {"__init__", "f"}),
        ("__import__('lib.f')", {"__init__", "f"}),
        ("import lib.table", {"__init__", "table", "f"}),
        ("from lib.fast import get", {"__init__", "fast/__init__", "fast/cpu", "fast/gpu"}),
        ("import lib.round_one", {"__init__", "round_one", "round_two"}),
        ("import lib.absent", {"__init__"}),
        ("import library.f", set()),
    ],
)
def test_imports_are_followed_wherever_they_stand(library, text, modules):
    assert found(library, text) == modules


def test_what_is_left_out_is_not_followed_either(library):
    assert found(library, "import lib.a", without=["d.py", "sub/c*"]) == {"__init__", "a", "sub/__init__", "sub/b"}


def test_a_start_in_the_library_counts_itself_and_its_packages(library):
    names = module_digests(library / "sub/c.py", library=library)
    assert set(names) == {"lib/lib/__init__.py", "lib/lib/sub/__init__.py", "lib/lib/sub/c.py"}


@pytest.mark.parametrize(
    ("cells", "modules"),
    [
        (["import lib.f"], {"__init__", "f"}),
        (["%matplotlib inline\nimport lib.f", "!ls\nfiles = !ls\nlib?"], {"__init__", "f"}),
        (["%%time\nfrom lib import f"], {"__init__", "f"}),
        (["import lib.f\nif True:\n    %time f()\nx = %time 3"], {"__init__", "f"}),
        (["this is no Python at all\nimport lib.f\nfrom lib import e"], {"__init__", "e", "f"}),
        (["await thing()\nimport lib.f"], {"__init__", "f"}),
    ],
)
def test_notebooks_are_read_with_all_that_ipython_allows(library, cells, modules):
    markdown = {"cell_type": "markdown", "source": ["import lib.lonely"]}
    notebook = {"cells": [markdown, *({"cell_type": "code", "source": cell.splitlines(True)} for cell in cells)]}
    assert found(library, json.dumps(notebook), "start.ipynb") == modules


@pytest.mark.parametrize("name", ["pretrain", "steering"])
def test_nothing_that_a_notebook_imports_is_missed(name):
    path = ROOT / f"notebooks/{name}.ipynb"
    cells = [
        "".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"
    ]
    imports = next(cell for cell in cells if "from trimtab" in cell).split("\n\nstage = ")[0].split("\n\n%")[0]
    lines = "\n".join(line for line in imports.splitlines() if line.startswith(("import", "from", "    ", ")")))
    script = textwrap.dedent(
        """
        import sys
        for module in list(sys.modules.values()):
            if module.__name__.partition(".")[0] == "trimtab":
                print(module.__file__)
        """
    )
    run = subprocess.run([sys.executable, "-c", lines + script], capture_output=True, encoding="utf-8", check=True)
    loaded = {f"lib/{Path(file).relative_to(code.LIBRARY.parent).as_posix()}" for file in run.stdout.split()}
    assert len(loaded) > 5
    assert loaded <= set(module_digests(path))


def test_a_function_is_known_by_its_module_and_the_library_behind_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    marks = []
    texts = ("def f():\n    return 1", "def f():\n    '''One.'''\n    return 1  # one", "def f():\n    return 2")
    for number, text in enumerate(texts):
        (tmp_path / f"module_{number}.py").write_text(text, encoding="utf-8")
        marks.append(code.of(partial(__import__(f"module_{number}").f)))
    assert marks[0] == marks[1] != marks[2]
    assert code.of(digest) != code.of(partial)
    assert code.of(len), "a function without a text has a digest too"


def test_code_is_known_as_it_was_loaded(tmp_path, monkeypatch):
    """A kernel computes with what it has imported, whatever the file has become."""
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "edited_later.py"
    file.write_text("def f():\n    return 1", encoding="utf-8")
    module = __import__("edited_later")
    before = code.of(module.f)
    file.write_text("def f():\n    return 2 + 2", encoding="utf-8")
    assert code.of(module.f) == before
    module = __import__("importlib").reload(module)
    assert module.f() == 4
    assert code.of(module.f) != before


def of(text, name="f", file="typed_at_a_prompt"):
    """The digest of a function that a program makes, whose text can be found, as a notebook's can."""
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    names: dict = {}
    exec(compile(text, file, "exec"), names)
    return code.of(names[name])


PAIR = "f, g = lambda x: x + 1, lambda x: x + 2"


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("# moved\n\nf, g = (lambda x: x + 1), lambda x: x + 3", True),
        ("f = lambda x: (\n    x\n    + 1  # one\n)", True),
        ("g, f = lambda x: x + 1, lambda x: x + 2", False),
        ("f = lambda x: lambda x: x + 1", False),
        ("f = (lambda x: lambda x: x + 1)(0)", False),
        ("g, f = lambda: (lambda x: x + 1), lambda x: x + 1", True),
        ("f = [lambda é: 'é', lambda x: x + 1][1]", True),
        ("def f(x): return x + 1", False),
    ],
)
def test_a_lambda_is_known_by_its_own_text(text, same):
    assert (of(text) == of(PAIR)) == same


def test_a_function_whose_text_is_lost_is_known_by_its_bytecode():
    first = "def f(x):\n    {}\n    return x in {{'a', 'b'}} or [y + {} for y in x]"
    digests = [of(first.format(doc, number), file="") for doc, number in (("'A'", 1), ("'B'", 1), ("'A'", 2))]
    assert digests[0] == digests[1] != digests[2]
    assert "0x" not in json.dumps(code._bytecode((lambda: lambda: {"a"}).__code__))
