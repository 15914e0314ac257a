"""Scales: compose params.yaml from conf/ through DVC's own Hydra support, and copy the project to run another scale."""

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trimtab.errors import InputError
from trimtab.pipeline.provenance import PRODUCTS

COPY_MARKER = ".git/trimtab-copy"
"""What tells an earlier copy, which may be replaced, from any other folder."""


def compose(root: Path, output: Path, scale: str = "laptop", overrides: Sequence[str] = ()) -> None:
    """Write to `output` what `dvc exp run -S scale=<scale> -S <override> ...` would make of params.yaml."""
    from dvc.exceptions import DvcException
    from dvc.utils.hydra import compose_and_dump
    from hydra.errors import HydraException

    scales = sorted(path.stem for path in (root / "conf/scale").glob("*.yaml"))
    if scale not in scales:
        raise InputError(f"{scale!r} is not a scale: choose one of {', '.join(scales)}.")
    try:
        compose_and_dump(
            output, str((root / "conf").resolve()), None, "config", str(root), [f"scale={scale}", *overrides]
        )
    except (DvcException, HydraException) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"conf/ does not compose with {' '.join(overrides)}: {reason}") from error


def copy_project(root: Path, target: Path, scale: str) -> None:
    """Copy the working tree (what git tracks or would track) to `target`, a repository of its own, at another scale.

    Nothing is shared with the original: neither the DVC cache nor what was last produced.
    """
    target = target.resolve()
    marker = target / COPY_MARKER
    if target == root.resolve() or target in root.resolve().parents or (target.exists() and not marker.exists()):
        raise InputError(f"{target} exists and is no earlier copy: name a new folder, such as scratch/smoke.")
    with tempfile.TemporaryDirectory() as scratch:  # an unknown scale must be found out before anything is replaced
        compose(root, Path(scratch) / "params.yaml", scale)
        composed = (Path(scratch) / "params.yaml").read_text()
    produced = [f":(exclude){path}" for path in PRODUCTS]
    listed = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard", ".", *produced]
    done = subprocess.run(listed, capture_output=True, check=False)
    if done.returncode:
        raise InputError(f"{root} is not a git repository: only a checkout can be copied.")
    names = done.stdout.decode().split("\0")
    shutil.rmtree(target, ignore_errors=True)
    for name in filter(None, names):
        source = root / name
        if source.is_file():  # a file deleted but still tracked is no part of the working tree
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    (target / "params.yaml").write_text(composed)
    identity = ["-c", "user.name=trimtab", "-c", "user.email=trimtab@localhost"]
    for arguments in (["init", "--quiet"], ["add", "--all"], [*identity, "commit", "--quiet", "-m", f"scale={scale}"]):
        subprocess.run(["git", "-C", str(target), *arguments], check=True)
    marker.write_text(f"{root.resolve()}\n")
