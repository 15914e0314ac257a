"""Digests of code by what it does: comments, docstrings, formatting and the Python that parses it leave them alone."""

import ast
import hashlib
import inspect
import json
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatch
from functools import cache, partial
from importlib.machinery import ModuleSpec
from pathlib import Path
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
    library, found, specs = library.resolve(), dict[Path, str](), _specs()
    waiting, seen = [path.resolve() for path in start], set[Path]()
    while waiting:
        path = waiting.pop()
        inside = path.relative_to(library).as_posix() if path.is_relative_to(library) else ""
        if path in seen or any(fnmatch(inside, pattern) for pattern in without):
            continue
        seen.add(path)
        source, package = _source(path, specs.get(path)), ""
        if inside:
            found[path] = digest(source)
            package = ".".join([library.name, *Path(inside).parent.parts])
            waiting += _files(package, library)
        for name in _imports(source, package):
            waiting += _files(name, library)
    return {f"lib/{library.name}/{path.relative_to(library).as_posix()}": found[path] for path in sorted(found)}


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
    """The digest of a function's code: its module's, and that of every library module behind it. Of a partial: of the
    function inside. A function of a notebook or a script, where everything else changes too, is known by itself."""
    while isinstance(function, partial):
        function = function.func
    module = inspect.getmodule(function)
    file = Path(getattr(module, "__file__", None) or "")
    known = file.is_file() and file.suffix == ".py"
    parts = module_digests(file, without=DISPLAY) if known else {}
    own = known and function.__module__ != "__main__"
    parts[""] = digest(_source(file.resolve(), _specs().get(file.resolve())) if own else _text_of(function))
    return f"sha256:{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]}"


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
    specs, begin = _specs(), LIBRARY / "pipeline/notebook.py"
    found["lib/trimtab/pipeline/notebook.py"] = digest(_source(begin, specs.get(begin)))
    return found | {
        file.relative_to(root.resolve()).as_posix(): digest(_source(file, specs.get(file))) for file in sorted(mine)
    }


def name_of(function: Callable[..., Any]) -> str:
    """Which function of its module it is; of one without a name of its own, the text's digest as well."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{name} {digest(_text_of(function))}" if "<lambda>" in name else name


def _text_of(function: Callable[..., Any]) -> str:
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)  # typed at a prompt: no text is left of it
        return repr((code.co_code, code.co_consts, code.co_names)) if code else repr(function)


_texts: dict[Path, tuple[ModuleSpec, str]] = {}
"""Texts of modules of this process, by file, and the specs they were loaded by: a file may be edited since, which
changes nothing until it is loaded again."""


def _source(path: Path, spec: ModuleSpec | None = None) -> str:
    """A module's text; of a notebook the text of its code cells. `spec`: of the module, where this process has it."""
    if spec is not None and path in _texts and _texts[path][0] is spec:
        return _texts[path][1]
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        if spec is not None:
            _texts[path] = spec, text
        return text
    cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return "\n".join(map(python_of, cells))


def _specs() -> dict[Path, ModuleSpec]:
    """By file, what the modules of this process were loaded by."""
    specs = (getattr(module, "__spec__", None) for module in list(sys.modules.values()))
    return {Path(spec.origin): spec for spec in specs if spec is not None and spec.has_location and spec.origin}


def python_of(cell: str) -> str:
    """A cell without magics; where it is no Python even so, its lines of imports."""
    cell = MAGIC.sub(lambda match: f"{match[1] or match[2] or ''}pass", cell)
    try:
        _parse(cell)
    except (SyntaxError, ValueError):
        return "\n".join(line.strip() for line in cell.splitlines() if re.match(r"\s*(from|import) [\w., *]+$", line))
    return cell


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
def _imports(source: str, package: str) -> tuple[str, ...]:
    """Dotted names that a program imports, or may; a name that ends in a dot means all modules of that package."""
    try:
        return tuple(dict.fromkeys(_names(_parse(source), package)))
    except (SyntaxError, ValueError):
        return ()


def _names(tree: ast.AST, package: str) -> Iterator[str]:
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
    """Files of the library that an import of this dotted name runs: the packages on the way, and the module."""
    top, *rest = name.split(".")
    if top != library.name:
        return []
    every = rest[-1:] == [""]
    rest = rest[:-1] if every else rest
    files = [library.joinpath(*rest[:i], "__init__.py") for i in range(len(rest) + 1)]
    files += [library.joinpath(*rest).with_suffix(".py")] if rest else []
    files += library.joinpath(*rest).glob("*.py") if every else []
    return [file for file in files if file.is_file()]
