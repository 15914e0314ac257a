"""Digests of code by what it does: comments, docstrings, formatting and the Python that parses it leave them alone."""

import ast
import hashlib
import inspect
import json
import linecache
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatch
from functools import cache, lru_cache, partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

LIBRARY = Path(__file__).resolve().parent
DISPLAY = ("plots.py", "markup.py", "claims.py", "*/figures.py", "*/panels.py", "*/pages.py", "pipeline/*")
"""Modules that show or file what was computed, and take no part in computing it."""
MAGIC = re.compile(r"^(\s*)(?:[\w, .]+=\s*)?(?:%|!|\?).*|^(\s*)[\w.]+\?+\s*$", re.MULTILINE)
"""Lines of a notebook that IPython understands and Python does not."""


def module_digests(*start: Path, without: Iterable[str] = (), library: Path = LIBRARY) -> dict[str, str]:
    """Digests of every library module that notebooks or .py files import, directly or through others, by name such as
    `lib/trimtab/launch.py`. A start inside the library counts too; `without`: patterns of paths within the library that
    are neither counted nor followed.

    Imports are read, not run: those inside functions count, those under TYPE_CHECKING do not. A module that is imported
    by a computed name brings all modules of the folder it is imported in.
    """
    library, without, found = library.resolve(), tuple(without), dict[str, str]()
    waiting = [path.resolve() for path in start]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        inside = _within(path, library, without)
        if inside is None:
            continue
        source, package = _source(path), ""
        if inside:
            found[f"lib/{library.name}/{inside}"] = digest(source)
            package = ".".join([library.name, *Path(inside).parent.parts])
        for place in _imports(source, package, library):
            for file in [place] if place.suffix else place.glob("*.py"):
                if file not in seen:
                    seen.add(file)
                    waiting += [file] if file.is_file() else []
    return dict(sorted(found.items()))


@cache
def _within(path: Path, library: Path, without: tuple[str, ...]) -> str | None:
    """A file's path within the library, nothing of one outside, None of one that is left out."""
    inside = path.relative_to(library).as_posix() if path.is_relative_to(library) else ""
    return None if any(fnmatch(inside, pattern) for pattern in without) else inside


@cache
def digest(source: str) -> str:
    """Sixteen hex digits of a program's syntax tree without what cannot change its behaviour; of the text itself where
    it is not Python."""
    try:
        content = json.dumps(_plain(_parse(source)))
    except (SyntaxError, ValueError):
        content = source
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def of(function: Callable[..., Any]) -> str:
    """The digest of a function or class: of its text, its module's, and that of every library module behind it. A
    function of a notebook or a script, where everything else changes too, is known by itself; what comes with Python
    by its name; what has no text by its bytecode, which another Python makes otherwise. Of a partial or a method: of
    the function inside."""
    while isinstance(function, partial | MethodType):
        function = function.func if isinstance(function, partial) else function.__func__
    module, name = _module_of(function), getattr(function, "__qualname__", type(function).__qualname__)
    where, parts = str(getattr(module, "__name__", "")), ["", ""]
    if where.partition(".")[0] not in sys.stdlib_module_names:
        parts = [of_module(module, own=in_file(function)), _text_of(function)]
    parts += [name] if any(parts) else [where, name]
    return f"sha256:{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"


def of_module(module: ModuleType | None, own: bool = True) -> str:
    """The digest of a module's text, unless `own` is off, and of every library module behind it."""
    file = Path(getattr(module, "__file__", None) or "").resolve()
    if file.suffix != ".py" or not file.is_file():
        return ""
    parts = module_digests(file, without=DISPLAY) | ({"": digest(_source(file))} if own else {})
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def in_file(function: Callable[..., Any]) -> bool:
    """Whether a function or class is known by the text of an imported module."""
    module, program = _module_of(function), _program_of(function)
    file = str(getattr(module, "__file__", ""))
    there = program is None or Path(program.co_filename).resolve() == Path(file).resolve()
    return there and file.endswith(".py") and module is not sys.modules["__main__"]


def behind(names: Mapping[str, Any], root: Path) -> dict[str, str]:
    """Digests of the code behind a program's global names, by file: the library modules whose functions, classes and
    modules it has imported, with all that these import, and other modules under `root`. Without `DISPLAY`, but with
    what every notebook begins with."""
    tests = (inspect.ismodule, inspect.isroutine, inspect.isclass)
    named = (value for value in names.values() if any(is_one(value) for is_one in tests))
    modules = [value if inspect.ismodule(value) else inspect.getmodule(value) for value in named]
    files = {Path(file).resolve() for module in modules if (file := getattr(module, "__file__", None))}
    files = {file for file in files if file.suffix == ".py" and "site-packages" not in file.parts and file.is_file()}
    mine = {file for file in files if file.is_relative_to(root.resolve()) and not file.is_relative_to(LIBRARY)}
    found = module_digests(*mine, *(file for file in files if file.is_relative_to(LIBRARY)), without=DISPLAY)
    found["lib/trimtab/pipeline/notebook.py"] = digest(_source(LIBRARY / "pipeline/notebook.py"))
    return found | {file.relative_to(root.resolve()).as_posix(): digest(_source(file)) for file in sorted(mine)}


def _module_of(function: Callable[..., Any]) -> ModuleType | None:
    if isinstance(function, FunctionType):  # a wrapper takes the name of another's module
        return sys.modules.get(function.__globals__.get("__name__", ""))
    return inspect.getmodule(function)


def _program_of(function: Callable[..., Any]) -> CodeType | None:
    return function.__code__ if isinstance(function, FunctionType) else None


def _text_of(function: Callable[..., Any]) -> str:
    """The digest of its own text, or of its bytecode. Of several lambdas on a line it is the one that holds all of the
    program's instructions, and of those within one another the innermost."""
    program = _program_of(function)
    if program is None:
        try:
            return "" if in_file(function) else digest(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError):
            return ""
    file = Path(program.co_filename).resolve()
    lines = () if in_file(function) else linecache.getlines(program.co_filename, function.__globals__)
    source = _source(file) if in_file(function) else "".join(lines)
    return _program_digest(source, program, program.co_linetable, function.__doc__)


@cache
def _program_digest(source: str, program: CodeType, _lines: bytes, doc: str | None) -> str:
    """`_lines`: where its instructions lie, by which Python does not tell programs apart."""
    node = _definition(source, program)
    content = _plain(node) if node else _bytecode(program, doc)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@lru_cache(maxsize=16)
def _functions(source: str) -> Mapping[tuple[str, int], list[ast.AST]]:
    """Definitions and lambdas of a program, by name and first line; none of a text that is not Python."""
    found: dict[tuple[str, int], list[ast.AST]] = {}
    try:
        tree = _parse(source)
    except (SyntaxError, ValueError):
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])
            found.setdefault((getattr(node, "name", "<lambda>"), first), []).append(node)
    return found


def _definition(source: str, program: CodeType) -> ast.AST | None:
    found = _functions(source).get((program.co_name, program.co_firstlineno), [])
    if len(found) > 1:
        at = [place for place in program.co_positions() if None not in place and place[2] != place[3]]
        found = [
            node for node in found if isinstance(node, ast.Lambda) and all(_holds(node.body, *each) for each in at)
        ]
        found = sorted(found, key=lambda node: len(ast.dump(node)))[: 1 if at else 0]
    return found[0] if found else None


def _holds(node: ast.expr, line: Any, last_line: Any, column: Any, last: Any) -> bool:
    end = node.end_lineno or 0, node.end_col_offset or 0
    return (node.lineno, node.col_offset) <= (line, column) and (last_line, last) <= end


def _bytecode(value: Any, doc: str | None = None) -> Any:
    """A program, or a constant of one, as lists and strings."""
    if isinstance(value, CodeType):
        constants = [None if each == doc else each for each in value.co_consts]
        names = value.co_names, value.co_varnames, value.co_freevars
        return [value.co_code.hex(), _bytecode(names), [_bytecode(each) for each in constants]]
    if isinstance(value, tuple | frozenset):
        items = [_bytecode(each) for each in value]
        return [type(value).__name__, *(items if isinstance(value, tuple) else sorted(items, key=json.dumps))]
    return [type(value).__name__, ascii(value)]


_texts: dict[Path, tuple[ModuleSpec, str]] = {}
"""Texts of modules of this process, by file, and the specs they were loaded by: a file may be edited since, which
changes nothing until it is loaded again."""


def _source(path: Path) -> str:
    """A module's text, as it was when this process loaded it; of a notebook the text of its code cells."""
    spec, text = _texts.get(path, (None, ""))
    if spec is not None and getattr(sys.modules.get(spec.name), "__spec__", None) is spec:
        return text
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        return "\n".join(map(python_of, cells))
    for module in list(sys.modules.values()):
        spec = getattr(module, "__spec__", None)
        if spec is not None and spec.origin == str(path):
            _texts[path] = spec, text
    return text


def python_of(cell: str) -> str:
    """A cell without magics; where it is no Python even so, its lines of imports."""
    cell = MAGIC.sub(lambda match: f"{match[1] or match[2] or ''}pass", cell)
    try:
        _parse(cell)
    except (SyntaxError, ValueError):
        return "\n".join(line.strip() for line in cell.splitlines() if re.match(r"\s*(from|import) [\w., *]+$", line))
    return cell


@lru_cache(maxsize=4)  # a module is read twice in a row: for what it does, and for what it imports
def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def _plain(node: Any) -> Any:
    """A syntax tree as lists and strings that are equal under every Python."""
    if isinstance(node, list):
        return [_plain(item) for item in node if not isinstance(item, ast.Pass) and not _idle(item)]
    if isinstance(node, ast.JoinedStr):
        return ["JoinedStr", *_pieces(node)]
    if not isinstance(node, ast.AST):
        return ascii(node)
    kept = {name: value for name, value in ast.iter_fields(node) if name not in ("ctx", "kind", "type_comment")}
    named = [[name, _plain(value)] for name, value in sorted(kept.items()) if value is not None and value != []]
    if isinstance(node, ast.Constant):  # None is a value here
        named = [["value", type(node.value).__name__, ascii(node.value)]]
    return [type(node).__name__, *named]


def _idle(node: Any) -> bool:
    """A statement that does nothing: a docstring, or `...`."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _pieces(node: ast.JoinedStr) -> list[Any]:
    """Parts of an f-string, neighbouring texts as one: where they are cut differs between Pythons."""
    pieces: list[Any] = []
    for value in node.values:
        if not isinstance(value, ast.Constant):
            pieces.append(_plain(value))
        elif pieces and isinstance(pieces[-1], str):
            pieces[-1] += str(value.value)
        elif value.value:
            pieces.append(str(value.value))
    return pieces


@cache
def _imports(source: str, package: str, library: Path) -> tuple[Path, ...]:
    """Files of the library that a program of this package imports, or may, where they exist; a folder stands for all
    modules in it."""
    try:
        names = [package, *_names(_parse(source), package)]
    except (SyntaxError, ValueError):
        names = [package]
    return tuple(dict.fromkeys(file for name in names for file in _files(name, library)))


def _names(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names that a program imports, or may; a name that ends in a dot means all modules of that package."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from _names(ast.Module(node.orelse, []), package)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute("." * node.level + (node.module or ""), package)
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Call) and re.search(r"import_module$|^__import__$", ast.unparse(node.func)):
            name = node.args[0] if node.args else None
            yield _absolute(name.value, package) if _is_text(name) else f"{package}."  # type: ignore[union-attr]
        elif _is_text(node) and re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", node.value):  # type: ignore[attr-defined]
            yield node.value  # type: ignore[attr-defined]  # a name in a table of what is imported when first used
        yield from _names(node, package)


def _is_text(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _absolute(name: str, package: str) -> str:
    level = len(name) - len(name.lstrip("."))
    above = package.split(".")[: len(package.split(".")) - level + 1] if level else []
    return ".".join([*above, name[level:]] if name[level:] else above)


def _files(name: str, library: Path) -> list[Path]:
    """What an import of this dotted name runs of the library: the packages on the way, and the module."""
    top, *rest = name.split(".")
    if top != library.name:
        return []
    every = rest[-1:] == [""]
    rest = rest[:-1] if every else rest
    files = [library.joinpath(*rest[:i], "__init__.py") for i in range(len(rest) + 1)]
    files += [library.joinpath(*rest).with_suffix(".py")] if rest else []
    return [*files, *([library.joinpath(*rest)] if every else [])]
