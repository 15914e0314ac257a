"""Run one function on many jobs, inline or in processes of their own; finished results are kept on disk."""

import inspect
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from trimtab import code
from trimtab.errors import InputError
from trimtab.files import read_json, write_json
from trimtab.identity import Identity, digest, identify, machine, tell
from trimtab.processes import pool

CHECKPOINT = "checkpoint.safetensors"
"""Name of a job's checkpoint in its place."""
OWNER = "identity.json"
"""Name of the file that says whose place it is."""


def each(
    function: Callable[..., Any],
    jobs: Sequence[tuple[Any, ...]],
    folder: Path,
    *,
    identity: Any = None,
    workers: int = 1,
    places: bool = False,
    title: str = "jobs",
) -> list[Any]:
    """function(*job) for every job, in their order; results are JSON-able, and kept in `folder`.

    A result is used again where job, code, threads, versions and `identity` are the same: `identity` says what else it
    depends on (contents of data and models, the device), as `identity.identify` takes it. Plain values that a partial
    holds count by themselves. Results of another identity are kept, and told of. With `places` the function is also
    given `place`, a folder of this job and identity alone; the file `CHECKPOINT` in it is dropped once the result is
    kept.

    With several workers each is a process with an equal share of torch's threads, at least one, kept for the next call;
    `function` must then be importable, or a partial of one that is. Raises what a job raises, and InputError where a
    worker process dies; jobs that run by then are finished first.
    """
    if workers < 1:
        raise InputError(f"workers must be positive, not {workers}.")
    threads = max(1, torch.get_num_threads() // workers)
    parts = identify(identity, **_held(function), **machine() | {"threads": threads})
    parts |= {"function": code.name_of(_inner(function)), "code": code.of(function)}
    keys = [digest([parts, list(job)]) for job in jobs]
    files = {key: folder / f"{key}.json" for key in keys}
    missing = {key: job for key, job in zip(keys, jobs, strict=True) if not files[key].is_file()}
    owners = {key: {"identity": parts, "job": digest(list(job))} for key, job in missing.items()}
    _tell_of_others(folder, owners)
    for key, owner in owners.items() if places else ():
        write_json(folder / key / OWNER, owner)
    calls = {
        key: partial(function, *job, **({"place": folder / key} if places else {})) for key, job in missing.items()
    }
    done = sum(key not in missing for key in keys)
    with tqdm(total=len(jobs), initial=done, desc=title, unit="run", mininterval=1) as bar:

        def keep(key: str, result: Any) -> None:
            write_json(files[key], owners[key] | {"result": result}, strict=False)
            (folder / key / CHECKPOINT).unlink(missing_ok=True)
            bar.update(keys.count(key))

        if workers == 1:
            for key, call in calls.items():
                keep(key, call())
        elif calls:
            pool(workers, threads).run(calls, keep)
    return [read_json(files[key])["result"] for key in keys]


def in_worker() -> bool:
    """Whether this is a process of `each`: bars of several would write over one another."""
    return multiprocessing.parent_process() is not None


def _inner(function: Callable[..., Any]) -> Callable[..., Any]:
    return function.func if isinstance(function, partial) else function


def _held(function: Callable[..., Any]) -> Identity:
    """What a partial or a closure was bound to, as far as it has contents of its own: things that change, as lists do,
    and what lies at paths are for the caller's identity to tell."""
    values: dict[str, Any] = {}
    if isinstance(function, partial):
        values = {f"argument {i}": value for i, value in enumerate(function.args)} | function.keywords
    if inspect.isfunction(_inner(function)):
        values |= inspect.getclosurevars(_inner(function)).nonlocals
    found: Identity = {}
    for name, value in values.items():
        if not isinstance(value, Path | list | dict | set):
            with suppress(InputError):
                found |= identify(**{name: value})
    return found


def _tell_of_others(folder: Path, owners: Mapping[str, Mapping[str, Any]]) -> None:
    """Say that results or progress of these jobs are there under another identity, and in what it differs."""
    by_job = {owner["job"]: owner["identity"] for owner in owners.values()}
    for path in sorted([*folder.glob("*.json"), *folder.glob(f"*/{OWNER}")]) if by_job else ():
        with suppress(InputError):  # what is damaged here is not ours
            there = read_json(path)
            here = by_job.get(there.get("job")) if isinstance(there, dict) and "identity" in there else None
            if here is not None and digest(there["identity"]) != digest(here):
                tell(path.parent if path.name == OWNER else path, there["identity"], here)
                return
