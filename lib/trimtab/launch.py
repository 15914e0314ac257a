"""Run one function on many jobs: inline, or in processes of their own; what is finished stays finished."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import lru_cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from trimtab.files import fingerprint, read_json, write_json


def each(
    function: Callable[..., Any],
    jobs: Sequence[tuple[Any, ...]],
    folder: Path,
    *,
    workers: int = 1,
    title: str = "jobs",
) -> list[Any]:
    """function(*job) for every job, in their order; results are JSON-able, and kept in `folder`.

    Called again after an interruption, only what is missing is run. With several workers each is a process with an
    equal share of torch's threads, at least one, kept for the next call; `function` must then be importable, or a
    partial of one that is.
    """
    files = [folder / f"{fingerprint(list(job))[:16]}.json" for job in jobs]
    missing = [i for i, file in enumerate(files) if not file.is_file()]
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc=title, unit="run", mininterval=1)

    def keep(i: int, result: Any) -> None:
        write_json(files[i], result)
        bar.update()

    if workers == 1:
        for i in missing:
            keep(i, function(*jobs[i]))
    elif missing:
        pool = _pool(workers, max(1, torch.get_num_threads() // workers), *_determinism())
        futures: dict[Future[Any], int] = {}
        try:
            for i in missing:
                futures[pool.submit(function, *jobs[i])] = i
            for future in as_completed(futures):
                keep(futures[future], future.result())
        except BaseException:
            _pool.cache_clear()  # the next call begins with processes of its own
            pool.shutdown(wait=True, cancel_futures=True)
            for future, i in futures.items():
                if future.done() and not future.cancelled() and not future.exception() and not files[i].is_file():
                    keep(i, future.result())
            raise
    bar.close()
    return [read_json(file) for file in files]


@lru_cache(maxsize=1)
def _pool(workers: int, *settings: Any) -> ProcessPoolExecutor:
    """The processes of the last call where they compute as wanted, for they have imported what takes seconds; else new
    ones. They wait for work until this process ends."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, settings)


def in_worker() -> bool:
    """Whether this is a process of `each`: bars of several would write over one another."""
    return multiprocessing.parent_process() is not None


def _determinism() -> tuple[bool, bool, bool]:
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return *algorithms, torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


def _begin(threads: int, deterministic: bool, warn_only: bool, fill: bool) -> None:
    """In a worker: compute as the parent does, on a share of its threads, and end with it even where it is killed. An
    orphan would go on beside the resumed run, in the same files."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
    parent = multiprocessing.parent_process()
    assert parent
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
