"""Threads of numba's kernels."""

import numba as nb
import torch


def as_torch() -> None:
    """Give numba as many threads as torch has. Its OpenMP layer is torch's too, and resets torch's number when numba
    starts, which is at the first call of `set_num_threads`."""
    wanted = torch.get_num_threads()
    nb.set_num_threads(min(wanted, nb.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != wanted:
        torch.set_num_threads(wanted)
