"""Scales: compose params.yaml from conf/ through DVC's own Hydra support, and copy the project to run another scale."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from trimtab.errors import InputError
from trimtab.files import atomic, remove
from trimtab.pipeline.provenance import PRODUCTS
from trimtab.pipeline.sections import nearest, parse_yaml, read_yaml
from trimtab.validation import shown

COPY_MARKER = ".git/trimtab-copy"
"""What tells an earlier copy, which may be replaced, from any other folder."""
IDENTITY = ("-c", "user.name=trimtab", "-c", "user.email=trimtab@localhost", "-c", "commit.gpgsign=false")


def compose(root: Path, output: Path, scale: str = "laptop", overrides: Sequence[str] = ()) -> None:
    """Write to `output` what `dvc exp run -S scale=<scale> -S <override> ...` would make of params.yaml. Raises
    InputError for an unknown scale or override, and where `output` is there and holds something else."""
    from dvc.exceptions import DvcException
    from dvc.utils.hydra import compose_and_dump
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    scales = sorted(path.stem for path in (root / "conf/scale").glob("*.yaml"))
    if scale not in scales:
        raise InputError(f"{scale!r} is not a scale: choose one of {', '.join(scales)}.")
    with atomic(output, own=_is_composed) as partial:
        composed = partial.with_name(f"{partial.name}.yaml")  # by its suffix DVC tells the format
        try:
            compose_and_dump(
                composed, str((root / "conf").resolve()), None, "config", str(root), [f"scale={scale}", *overrides]
            )
            composed.replace(partial)
        except (DvcException, HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
            given = f" with {shown(' '.join(overrides))}" if overrides else ""
            raise InputError(f"conf/ does not compose{given}: {_reason(root, error)}") from error
        finally:
            remove(composed)


def copy_project(root: Path, target: Path, scale: str) -> None:
    """Copy the working tree (what git tracks or would track) to `target`, a repository of its own, at another scale.

    Nothing is shared with the original: neither the DVC cache nor what was last produced. An earlier copy is replaced.
    Raises InputError, and touches nothing, where `target` is anything else, or holds changes that no pipeline made.
    """
    target = target.resolve()
    if target.exists():
        _refuse_foreign(root.resolve(), target)
    with tempfile.TemporaryDirectory() as scratch:  # an unknown scale must be found out before anything is replaced
        compose(root, Path(scratch) / "params.yaml", scale)
        composed = (Path(scratch) / "params.yaml").read_text(encoding="utf-8")
    produced = [f":(exclude){path}" for path in PRODUCTS]
    listed = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard", ".", *produced]
    done = subprocess.run(listed, capture_output=True, check=False)
    if done.returncode:
        raise InputError(f"{root} is not a git repository: only a checkout can be copied.")
    names = done.stdout.decode().split("\0")
    remove(target)
    target.mkdir(parents=True)
    _git(target, "init", "--quiet")
    (target / COPY_MARKER).write_text(f"{root.resolve()}\n", encoding="utf-8")
    for name in filter(None, names):
        source = root / name
        if source.is_file():  # a file deleted but still tracked is no part of the working tree
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    (target / "params.yaml").write_text(composed, encoding="utf-8")
    _git(target, "add", "--all")
    _git(target, *IDENTITY, "commit", "--quiet", "-m", f"scale={scale}")


def _reason(root: Path, error: Exception) -> str:
    """The end of a sentence: why conf/ does not compose."""
    if unknown := re.search(r"Could not override '([\w.]+)'", str(error)):
        sections = read_yaml(root / "conf/config.yaml", "take the committed one (`git checkout conf`)")
        known = [f"{name}.{key}" for name, held in sections.items() if isinstance(held, dict) for key in held]
        return f"there is no `{unknown[1]}`{nearest(unknown[1], known)}"
    first = str(error).strip().partition("\n")[0]
    return f"{first[:200].rstrip('.') or type(error).__name__}."


def _refuse_foreign(root: Path, target: Path) -> None:
    """Raise InputError unless a folder is an earlier copy, as it was but for what the pipeline makes."""
    if target == root or target in root.parents or not (target / COPY_MARKER).is_file():
        raise InputError(f"{target} exists and is no earlier copy: name a new folder, such as scratch/smoke.")
    commits = _git(target, "rev-list", "--all").split()
    if not commits:  # killed before it was whole
        return
    changed = _git(
        target, "status", "--porcelain", "--", ".", *(f":(exclude){path}" for path in (*PRODUCTS, "README.md"))
    )
    if len(commits) > 1 or changed.strip():
        what = "commits of its own" if len(commits) > 1 else f"changes ({changed.split()[1]})"
        raise InputError(f"{target} is an earlier copy with {what}: name a new folder, or remove that one first.")


def _is_composed(path: Path) -> bool:
    """Whether a file holds parameters, as `compose` writes them."""
    try:
        found = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return found is None or (isinstance(found, dict) and "base" in found)


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
