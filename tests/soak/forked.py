"""Ranks forked from this process, which has imported torch: a job takes a fraction of a second."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.ports import free_ports

HUNG = "hung"


def start_ranks(size: int, body: Callable[[], None], log: Path, store: Path | None) -> list[int]:
    """Fork the ranks; each joins the job, calls ``body`` and ends as a script does. Returns their pids.

    Without a store, ``body`` joins the job, as a script does under a launcher.
    """
    (port,) = free_ports(1)
    return [_start(rank, size, body, Path(f"{log}.{rank}"), store, port) for rank in range(size)]


def wait_for(pids: list[int], limit_secs: float) -> list[int | str]:
    """How each rank ended: its exit status, minus the signal, or ``HUNG`` if it had to be killed."""
    ends: dict[int, int | str] = {}
    deadline = time.monotonic() + limit_secs
    while len(ends) < len(pids):
        for pid in set(pids) - ends.keys():
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                ends[pid] = HUNG
            elif (found := os.waitpid(pid, os.WNOHANG))[0]:
                ends[pid] = os.waitstatus_to_exitcode(found[1])
        time.sleep(0.005)
    return [ends[pid] for pid in pids]


def _start(rank: int, size: int, body: Callable[[], None], log: Path, store: Path | None, port: int) -> int:
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable()
    faulthandler.dump_traceback_later(95)  # not before it is held for hung: this can crash one that runs
    torch.set_num_threads(1)
    if store is None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
    else:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=30)
        )
    body()
    sys.exit(0)  # takes the interpreter down, as at the end of a script
