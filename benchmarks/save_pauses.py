"""What the thread that trains notices while a save is written: small steps of work, timed one by one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist

_QUIET_STEPS = 300
_SAVES = 3


def measure_pauses(
    begin: Callable[[int], Future[Any]] | None, step: int, remove_files: Callable[[], None]
) -> dict[str, float]:
    """Return times of a step in seconds, of the slowest rank, while saves are written, or with nothing beside it.

    A step is what a training does between two waits: some matrix products, and Python that launches them. All ranks;
    communicates.

    Args:
        begin: Begins a save of a step; None measures without one.
        step: The first that is not saved yet.
        remove_files: Removes what was saved.
    """
    # 128 x 128: some ten microseconds each, so that the launching thread is what limits.
    work = [torch.randn(128, 128) for _ in range(8)]
    seconds: list[float] = []
    for number in range(_SAVES):
        future = begin(step + number) if begin is not None else None
        # While the save is written, or until there are enough steps without one.
        while not future.done() if future is not None else len(seconds) < _QUIET_STEPS:
            seconds.append(_step(work))
        if future is not None:
            future.result()
        remove_files()
    usual = statistics.median(seconds)
    # How much later than usual: a step is always of the same work.
    late = sorted(max(0.0, one - usual) for one in seconds)
    found = torch.tensor(
        [usual, sorted(seconds)[int(len(seconds) * 0.99)], late[int(len(late) * 0.99)]], dtype=torch.float64
    )
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return dict(zip(("median", "p99", "pause"), found.tolist(), strict=True))


def _step(work: list[torch.Tensor]) -> float:
    began = time.perf_counter()
    for matrix in work:
        for _ in range(2):
            torch.tanh(matrix @ matrix)
    return time.perf_counter() - began
