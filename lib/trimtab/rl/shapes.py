"""Few shapes: batches and rows come in whole blocks.

For each shape that it has not met before, a CPU's library of matrix products prepares a program anew, and keeps it.
Where every batch of completions has a width of its own that takes longer than the padding, and a process grows.
"""

BLOCK = 16


def whole_blocks(size: int) -> int:
    """The least multiple of `BLOCK` that holds so many."""
    return -(-size // BLOCK) * BLOCK
