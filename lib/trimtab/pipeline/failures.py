"""Why the last `dvc repro` stopped, in one sentence: DVC's own last line says only that a command ended with 2."""

import contextlib
import os
from pathlib import Path

from trimtab.errors import InputError
from trimtab.files import read_json, write_json

FAILURES = Path("scratch/failures.json")
"""Under the root: by stage, the sentence that it ended with; a stage that succeeds takes its own away."""


def note(root: Path, sentence: str | None) -> None:
    """Remember why the stage that DVC runs in this process failed, or with None that it did not. Outside DVC, and on a
    disk that is full or closed, nothing happens."""
    stage = os.environ.get("DVC_STAGE")
    if stage is None:
        return
    with contextlib.suppress(OSError, InputError):
        before = failures(root)
        after = {name: told for name, told in before.items() if name != stage}
        if sentence is not None:
            after[stage] = sentence
        if after != before:
            write_json(root / FAILURES, after)


def failures(root: Path) -> dict[str, str]:
    """What is remembered: sentences by stage."""
    try:
        found = read_json(root / FAILURES)
    except InputError:
        return {}
    return {str(stage): str(told) for stage, told in found.items()} if isinstance(found, dict) else {}
