"""Worker processes for `launch`, joined by pipes alone: unlike queues and locks these leave nothing behind in shared
memory, however their parent ends."""

import atexit
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from trimtab.errors import InputError

PATIENCE = 10.0
"""Seconds that a process has to end by itself."""


@dataclass
class Worker:
    """A process that computes one call after another."""

    process: BaseProcess
    pipe: Connection
    key: str | None = None
    """Name of the call it is at."""

    @classmethod
    def start(cls, settings: tuple[Any, ...]) -> "Worker":
        """A new process, which computes as this one does."""
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, *settings))
        process.start()
        there.close()
        return cls(process, here)

    def begin(self, key: str, call: Callable[[], Any]) -> None:
        """Give it a call. Raises InputError where the process is dead."""
        try:
            self.pipe.send(call)
        except ConnectionError:
            raise self._dead() from None
        self.key = key

    def end(self) -> tuple[bool, Any]:
        """(whether the call returned, what it returned or raised). Raises InputError where the process died."""
        self.key = None
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            raise self._dead() from None

    def _dead(self) -> InputError:
        self.process.join(PATIENCE)
        status = self.process.exitcode or 0
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return InputError(
            f"A worker process {how}, perhaps for want of memory: lower `workers`, or the sizes of a run; "
            "finished results are kept."
        )


class Pool:
    """Worker processes of equal settings."""

    def __init__(self, workers: int, settings: tuple[Any, ...]) -> None:
        self.made_of = workers, settings
        self.workers = [Worker.start(settings) for _ in range(workers)]

    def run(self, calls: Mapping[str, Callable[[], Any]], keep: Callable[[str, Any], None]) -> None:
        """Compute all calls, and `keep` each result as it comes. After a failure nothing new begins, and it is raised
        when the other calls have ended; an interruption ends them at once."""
        waiting, failure = list(calls.items()), None
        try:
            while waiting or any(worker.key for worker in self.workers):
                for worker in self.workers:
                    if worker.key is None and waiting:
                        worker.begin(*waiting.pop(0))
                for pipe in wait([worker.pipe for worker in self.workers if worker.key]):
                    worker = next(each for each in self.workers if each.pipe is pipe)
                    try:
                        key, (returned, value) = str(worker.key), worker.end()
                        if not returned:
                            raise value
                        keep(key, value)
                    except Exception as error:
                        waiting, failure = [], failure or error
            if failure:
                raise failure
        except BaseException:
            self.close(PATIENCE if failure else 0.0)
            raise

    def alive(self) -> bool:
        """Whether every process waits for calls."""
        return all(worker.process.is_alive() and worker.key is None for worker in self.workers)

    def close(self, patience: float = PATIENCE) -> None:
        """End the processes, by force those that do not end by themselves in so many seconds."""
        for worker in self.workers:
            worker.pipe.close()
        for worker in self.workers:
            worker.process.join(patience)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self.workers = []


_pools: list[Pool] = []


def pool(workers: int, threads: int) -> Pool:
    """The processes of the last call where they compute as wanted, for they have imported what takes seconds; else new
    ones. They wait for calls until this process ends."""
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    wanted = workers, (threads, *algorithms, fill)
    if not _pools or not _pools[0].workers or _pools[0].made_of != wanted or not _pools[0].alive():
        _close()
        _pools.append(Pool(*wanted))
    return _pools[0]


@atexit.register
def _close() -> None:
    while _pools:
        _pools.pop().close()


def _serve(pipe: Connection, threads: int, deterministic: bool, warn_only: bool, fill: bool) -> None:
    """In a worker: compute as the parent does, on a share of its threads, and end with it even where it is killed. An
    orphan would go on beside the resumed run, in the same files."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to act on
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
    parent = multiprocessing.parent_process()
    assert parent
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    while True:
        try:
            answer = True, pipe.recv()()
        except EOFError:
            return
        except Exception as error:
            error.add_note("".join(traceback.format_exception(error)))  # where it was, which no pipe carries
            answer = False, error
        try:
            pipe.send(answer)
        except ConnectionError:
            return
        except Exception as error:
            pipe.send((False, InputError(f"A job's outcome cannot be sent to the process that waits for it: {error}.")))
