"""Where the project is."""

from pathlib import Path

from trimtab.errors import InputError


def project_root(start: Path | None = None) -> Path:
    """The folder at or above `start` (default: the working directory) that holds dvc.yaml."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").is_file():
            return folder
    raise InputError(f"{here} is not inside a Trimtab checkout: no dvc.yaml here or above.")
