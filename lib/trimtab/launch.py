"""Run one function on many jobs, inline or in processes of their own; finished results are kept on disk."""

import multiprocessing
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from trimtab.errors import InputError
from trimtab.files import read_json, write_json
from trimtab.identity import behaviour, digest, identify, machine, tell
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
    depends on (contents of data and models, the device), as `identity.identify` takes it. What a partial, a closure, a
    method or a callable object holds counts by itself, but for what lies at its paths. Results of another identity are
    kept, and told of; a file that holds no result is put aside. With `places` the function is also
    given `place`, a folder of this job and identity alone; the file `CHECKPOINT` in it is dropped once the result is
    kept.

    With several workers each is a process with an equal share of torch's threads, at least one, kept for the next call;
    `function` must then be importable, or a partial of one that is. Raises what a job raises, and InputError where a
    worker process dies; jobs that run by then are finished first.
    """
    if workers < 1:
        raise InputError(f"workers must be positive, not {workers}.")
    threads = max(1, torch.get_num_threads() // workers)
    parts = identify(behaviour(function), machine() | {"threads": threads}, identity)
    keys = [digest([parts, list(job)]) for job in jobs]
    files = {key: folder / f"{key}.json" for key in keys}
    missing = {key: job for key, job in zip(keys, jobs, strict=True) if not _is_kept(files[key])}
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


def _is_kept(file: Path) -> bool:
    """Whether a file holds a result. What holds none, cut short or edited, makes room and is told of."""
    if not file.is_file():
        return False
    with suppress(InputError):
        there = read_json(file)
        if isinstance(there, dict) and "result" in there:
            return True
    aside = file.with_suffix(".damaged")
    file.replace(aside)
    print(f"{file} holds no result: it is kept as {aside.name}, and its job is run again.", file=sys.stderr)
    return False


def _tell_of_others(folder: Path, owners: Mapping[str, Mapping[str, Any]]) -> None:
    """Say that results or progress of these jobs are there under another identity, and in what it differs."""
    by_job = {owner["job"]: owner["identity"] for owner in owners.values()}
    for path in sorted([*folder.glob("*.json"), *folder.glob(f"*/{OWNER}")]) if by_job else ():
        with suppress(InputError):  # what is damaged here is not ours
            there = read_json(path)
            there = there if isinstance(there, dict) and isinstance(there.get("identity"), dict) else {}
            here = by_job.get(str(there.get("job")))
            if here is not None and digest(there["identity"]) != digest(here):
                tell(path.parent if path.name == OWNER else path, there["identity"], here)
                return
