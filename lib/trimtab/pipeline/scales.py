"""Scales: compose params.yaml from conf/ through DVC's own Hydra support, and copy the project to run another scale."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from trimtab.errors import InputError
from trimtab.files import atomic, check_path
from trimtab.marks import MARK, own_files
from trimtab.pipeline.provenance import PRODUCTS
from trimtab.pipeline.report import MARKS
from trimtab.pipeline.sections import nearest, parse_yaml, read_yaml
from trimtab.validation import shown

HEADER = "# Composed from conf/ by `trimtab compose`, which overwrites what is edited here.\n"
COPY_MARKER = ".git/trimtab-copy"
"""What tells an earlier copy, which may be brought up to date, from any other folder."""
COPIED = "refs/trimtab/copied"
"""In a copy's repository, the commit of what was copied last."""
IDENTITY = ("-c", "user.name=trimtab", "-c", "user.email=trimtab@localhost", "-c", "commit.gpgsign=false")


def compose(root: Path, output: Path, scale: str = "laptop", overrides: Sequence[str] = ()) -> None:
    """Write to `output` what `dvc exp run -S scale=<scale> -S <override> ...` would make of params.yaml. Raises
    InputError for an unknown scale or override, and where `output` is there and nobody composed it."""
    text = composed(root, scale, overrides)
    with atomic(output, own=lambda path: _is_composed(path, text)) as partial:
        partial.write_text(text, encoding="utf-8")


def composed(root: Path, scale: str, overrides: Sequence[str] = ()) -> str:
    """The text of params.yaml at a scale; see `compose`."""
    from dvc.exceptions import DvcException
    from dvc.utils.hydra import compose_and_dump
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    scales = sorted(path.stem for path in (root / "conf/scale").glob("*.yaml"))
    if scale not in scales:
        raise InputError(f"{scale!r} is not a scale: choose one of {', '.join(scales)}.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"  # by its suffix DVC tells the format
        try:
            compose_and_dump(
                path, str((root / "conf").resolve()), None, "config", str(root), [f"scale={scale}", *overrides]
            )
        except (DvcException, HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
            given = f" with {shown(' '.join(overrides))}" if overrides else ""
            raise InputError(f"conf/ does not compose{given}: {_reason(root, error)}") from error
        return HEADER + path.read_text(encoding="utf-8")


def copy_project(root: Path, target: Path, scale: str) -> None:
    """Copy the working tree (what git tracks or would track) to `target`, a repository of its own, at another scale.

    Nothing is shared with the original: neither the DVC cache nor what was last produced. An earlier copy is brought
    up to date: its sources are replaced, and what its pipeline or its user made stays. Raises InputError, and touches
    nothing, where `target` is anything else, or a source there has been changed or is in the place of another file.
    """
    check_path(target)
    root, target = root.resolve(), target.resolve()
    marker, readme = target / COPY_MARKER, target / "README.md"
    free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if target in (root, *root.parents) or not (free or marker.is_file()):
        raise InputError(f"{target} exists and is no earlier copy: name a new folder, such as scratch/smoke.")
    text = composed(root, scale)
    produced = [f":(exclude){path}" for path in PRODUCTS]
    listed = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard", ".", *produced]
    done = subprocess.run(listed, capture_output=True, check=False)
    if done.returncode:
        raise InputError(f"{root} is not a git repository: only a checkout can be copied.")
    if free:
        marker.parent.mkdir(parents=True)
        marker.touch()  # first of all: whoever is killed from here on leaves a copy to go on with
    _git(target, "init", "--quiet")
    with atomic(target, "copy", own=lambda path: path == readme and _is_reported(target)) as partial:
        for name in filter(None, os.fsdecode(done.stdout).split("\0")):
            if (root / name).is_file():  # a file deleted but still tracked is no part of the working tree
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, partial / name)
        (partial / "params.yaml").write_text(text, encoding="utf-8")
    names = "\0".join([MARK, *own_files(target)["copy"]])
    _git(target, "--literal-pathspecs", "add", "--force", "--pathspec-from-file=-", "--pathspec-file-nul", given=names)
    _git(target, *IDENTITY, "commit", "--quiet", "--all", "--allow-empty", "-m", f"scale={scale}")
    _git(target, "update-ref", COPIED, "HEAD")


def _reason(root: Path, error: Exception) -> str:
    """The end of a sentence: why conf/ does not compose."""
    if unknown := re.search(r"Could not override '([\w.]+)'", str(error)):
        sections = read_yaml(root / "conf/config.yaml", "take the committed one (`git checkout conf`)")
        known = [f"{name}.{key}" for name, held in sections.items() if isinstance(held, dict) for key in held]
        return f"there is no `{unknown[1]}`{nearest(unknown[1], known)}"
    first = str(error).strip().partition("\n")[0]
    return f"{first[:200].rstrip('.') or type(error).__name__}."


def _is_composed(path: Path, text: str) -> bool:
    """Whether a file was composed: by Trimtab, whose header it has, or by `dvc exp run -S`, which gives it the sections
    and keys of `text` and no header."""
    try:
        held = path.read_text(encoding="utf-8")
        return held.startswith(HEADER) or _keys(held) == _keys(text)
    except (OSError, ValueError):
        return False


def _keys(text: str) -> Any:
    found = parse_yaml(text)
    sections = found.items() if isinstance(found, dict) else ()
    return {name: sorted(map(str, section)) if isinstance(section, dict) else None for name, section in sections}


def _is_reported(copy: Path) -> bool:
    """Whether a copy's README has changed in nothing but the claims, which `trimtab report` puts there."""
    between = re.compile(f"(?<={re.escape(MARKS[0])}).*(?={re.escape(MARKS[1])})", re.DOTALL)
    try:
        copied = _git(copy, "show", f"{COPIED}:README.md")
        return between.sub("", copied) == between.sub("", (copy / "README.md").read_text(encoding="utf-8"))
    except (subprocess.CalledProcessError, ValueError):
        return False


def _git(folder: Path, *arguments: str, given: str = "") -> str:
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, input=os.fsencode(given))
    return done.stdout.decode()
