"""The library imports on a bare machine, and its subjects do not import each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[1] / "lib/trimtab"
MODULES = [
    "pretrained",
    "texts",
    "corpus",
    "interventions",
    "activations",
    "sae",
    "claims",
    "checkpoint",
    "files",
    "launch",
    "rebased",
    "repetition.training",
    "repetition.reading",
    "repetition.evaluation",
]
TOOLS = [
    "dvc",
    "papermill",
    "nbclient",
    "nbformat",
    "IPython",
    "ipykernel",
    "jupyterlab",
    "hydra",
    "typer",
    "matplotlib",
]


def test_subject_modules_need_none_of_the_pipelines_tools():
    code = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {TOOLS!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
for name in {MODULES!r}:
    importlib.import_module(f"trimtab.{{name}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr


def imported(path: Path) -> set[str]:
    """Every module a file imports when it runs, `from trimtab import x` included, but not what only mypy sees."""
    names, tree = set(), ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("*.py")), ids=lambda p: str(p.relative_to(LIBRARY)))
def test_imports_run_one_way(path):
    inside = path.relative_to(LIBRARY).parts
    subjects = {p.name for p in LIBRARY.iterdir() if p.is_dir()} - {"activations", "interventions", "rl", "pipeline"}
    for parts in (name.split(".") for name in imported(path)):
        assert parts[0] != "nnsight" or inside[0] == "interventions", "only interventions may import nnsight"
        if parts[0] == "trimtab" and len(parts) > 1 and inside[0] != parts[1]:
            assert parts[1] != "pipeline", f"{path.name} imports the pipeline"
            assert parts[1] not in subjects, f"{path.name} imports another subject: {'.'.join(parts)}"
