"""Local inputs: texts, models and questions of the user's own under data/inputs, which DVC watches by content."""

from pathlib import Path

from trimtab.errors import InputError

INPUTS = Path("data/inputs")
"""Folder of local inputs, under the root."""


def refuse_links(path: Path, root: Path) -> None:
    """Raise InputError for a linked folder on the way to a local input, or in it. DVC follows links to files, and one
    that takes the place of a watched folder itself, but no other; a link that leads nowhere ends DVC with an error."""
    path, inputs = path.absolute(), (root / INPUTS).absolute()
    way = [each for each in (path, *path.parents) if inputs in each.parent.parents]
    for each in (*reversed(way), *(sorted(path.rglob("*")) if inputs in path.parents else ())):
        if each.is_symlink() and not each.is_file():
            what = "a linked folder, whose changes DVC would not notice" if each.is_dir() else "a link to nothing"
            raise InputError(f"{each.relative_to(inputs.parents[1])} is {what}: copy or hard-link the files instead.")
