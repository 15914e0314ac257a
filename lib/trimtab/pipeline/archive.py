"""Records wherever they lie: in the working tree, in a file of one's own, or at a commit, by way of DVC's cache."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from trimtab.claims import Verdict
from trimtab.errors import InputError
from trimtab.pipeline.records import BANNER, PROVENANCE, is_altered, parse_record, provenance_of, read_record, title_of


@dataclass(frozen=True)
class Filed:
    """A record, and what it says of itself."""

    label: str
    """As it was asked for."""
    record: NotebookNode

    @property
    def about(self) -> Mapping[str, Any]:
        """The record's metadata."""
        return self.record.metadata["trimtab"]

    @property
    def title(self) -> str:
        """The notebook's first heading."""
        return title_of(self.record) or self.label

    @property
    def provenance(self) -> dict[str, str]:
        """Commit, versions, hardware, times: as the record's cell has them."""
        return provenance_of(self.record)

    @property
    def knows(self) -> bool:
        """Whether it holds its parameters and results; early ones do not."""
        return "results" in self.about

    @cached_property
    def altered(self) -> bool:
        """Whether somebody has changed it since its run."""
        return is_altered(self.record)

    @property
    def parameters(self) -> dict[str, Any]:
        """What the notebook was run with."""
        return dict(self.about.get("parameters", {}))

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Of its results, groups flattened: `topk-8, k=2`."""
        return dict(_flat(self.about.get("results", {}).get("metrics", {})))

    @cached_property
    def verdicts(self) -> dict[str, Verdict]:
        """Of its results, by the claim's name."""
        return {each["name"]: Verdict(**each) for each in self.about.get("results", {}).get("claims", [])}

    def cells(self) -> NotebookNode:
        """The notebook as its author wrote it, with outputs: no parameters of the run, no provenance."""
        added = {PROVENANCE, BANNER, "injected-parameters"}
        kept = [cell for cell in self.record.cells if not added & set(cell.metadata.get("tags", []))]
        return NotebookNode({**self.record, "cells": kept, "metadata": NotebookNode()})


def effect_of(verdict: Verdict) -> str:
    """Effect and interval, as `0.396 (0.275 to 0.517)`."""
    if verdict.effect is None:
        return "no number"
    if verdict.low is None and verdict.high is None:
        return f"{verdict.effect:.3g} (unbounded)"
    low, high = ("unbounded" if each is None else f"{each:.3g}" for each in (verdict.low, verdict.high))
    return f"{verdict.effect:.3g} ({low} to {high})"


def find(root: Path, given: str) -> Filed:
    """The record that is asked for: the path of a file, a name as `sae/topk-8`, or `REVISION:NAME` as at a commit.

    Raises InputError where there is none, for a revision that git does not know, and where DVC's cache lacks it.
    """
    revision, colon, name = given.rpartition(":")
    if colon:
        return Filed(given, parse_record(_at(root, revision, name.removesuffix(".ipynb")), given))
    path = Path(given) if given.endswith(".ipynb") else root / "records" / f"{given}.ipynb"
    try:
        there = path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if not there:
        raise InputError(
            f"{given} is no record: {path} does not exist. Give a file, a name that `trimtab records list` has, or "
            "REVISION:NAME."
        )
    return Filed(given, read_record(path))


def _at(root: Path, revision: str, name: str) -> str:
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.scm import RevError

    path = f"records/{name}.ipynb"
    try:
        with Repo(str(root), rev=revision) as repo:
            if not repo.dvcfs.exists(path):
                raise InputError(f"{revision} has no record {name!r}.")
            return repo.dvcfs.read_text(path, encoding="utf-8")
    except RevError:
        raise InputError(f"{revision}:{name}: git knows no revision {revision!r}.") from None
    except UnicodeDecodeError:
        raise InputError(f"{revision}:{name} is not a record: it is no text in UTF-8.") from None
    except FileNotFoundError:
        raise InputError(
            f"{path} of {revision} is not in DVC's cache: `dvc pull`, or check {revision} out and run `dvc repro`."
        ) from None
    except (DvcException, ValueError, OSError) as error:
        raise InputError(f"{revision}:{name} cannot be read: {error}") from None


def _flat(group: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in group.items():
        where = f"{before}, {name}" if before else name
        if isinstance(value, Mapping):
            yield from _flat(value, where)
        else:
            yield where, value
