"""Threads of numba's kernels."""

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import numba as nb
import torch

_LOCK = threading.Lock()
_FORKED = False


def jit(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """numba's `njit`, kept on disk where a cache can be written there.

    A parallel kernel runs with as many threads as torch has. Two threads take turns in it, for numba's own layer of
    threads ends a process that has two callers at once; and in a fork of a process that has used it, where OpenMP would
    end the process, it runs on one.
    """

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            kernel = nb.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # numba found no folder for it: the library is installed where nobody may write
            kernel = nb.njit(nogil=True, **options)(function)
        if not options.get("parallel"):
            return kernel
        # Not from the cache on disk, which tells the two apart by nothing.
        alone = functools.cache(lambda: nb.njit(nogil=True, **options | {"parallel": False})(function))

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            if _FORKED:
                return alone()(*args)
            with _LOCK:
                as_torch()
                return kernel(*args)

        return call

    return wrap


def as_torch() -> None:
    """Give numba as many threads as torch has. Its OpenMP layer is torch's too, and resets torch's number when numba
    starts, which is at the first call of `set_num_threads`."""
    wanted = torch.get_num_threads()
    nb.set_num_threads(min(wanted, nb.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != wanted:
        torch.set_num_threads(wanted)


def _forked() -> None:
    global _LOCK, _FORKED
    _LOCK, _FORKED = threading.Lock(), True


os.register_at_fork(after_in_child=_forked)
