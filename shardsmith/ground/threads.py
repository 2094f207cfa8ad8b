"""How many threads a process uses."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from shardsmith.ground.torchrun.process import was_started_by_torchrun

_MOST_THREADS = 8


_LEAST_MEAN_BYTES = 64 << 10
"""Of a block, for which threads are of use."""


def useful_threads(nbytes: int, blocks: int) -> int:
    """How many threads of this process are of use for so many bytes in so many blocks.

    One, where blocks are small: the time goes into Python, and threads would hand its lock to and fro.
    """
    # Small on average: a few large blocks among many small ones do not pay for threads.
    small = nbytes < _LEAST_MEAN_BYTES * blocks
    return 1 if small else min(_MOST_THREADS, os.cpu_count() or 1)


@contextlib.contextmanager
def one_thread_per_operator() -> Iterator[None]:
    """We bring the threads; torch's own in each of them would only be in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_per_process() -> int | None:
    """How many threads each process of this host may use; None for one process, which finds out itself."""
    # The processes that torchrun started on this host share its cores.
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if was_started_by_torchrun() else 1
    return None if local == 1 else max(1, (os.cpu_count() or 1) // local)
