"""Runs of two ranks of which one is killed at a chosen point of what it does to the disk.

A server process imports torch once and forks the ranks, so that a run takes a fraction of a second. In the rank that
is to die, an audit hook and a wrapper of ``os.fsync`` count everything that it does to the run directory. What it reads
there is not counted: a kill before that leaves what a kill before the next point leaves.
"""

from __future__ import annotations

import faulthandler
import functools
import os
import resource
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from shardsmith.ground.process_end import finish
from shardsmith.sharding import staged_copy

staged_copy.SMALL_BYTES = 0  # the tensors of tests are small, and are to be copied as large ones are

RANKS = 2
WATCHED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


@dataclass(frozen=True, kw_only=True)
class KilledRun:
    """One run of all ranks, which are forked processes."""

    directory: Path
    """The run directory; files that belong to the test are beside it."""
    victim: int | None = None
    """The rank that writes down what it does to the disk."""
    point: int | None = None
    """It dies before it does this one of these things, counted from 0."""
    spare_others: bool = False
    """Let the other ranks find out by themselves; otherwise they are killed too, as a launcher does."""

    def train(self) -> None:
        """What every rank does."""
        raise NotImplementedError

    def beside(self, name: str) -> Path:
        return self.directory.with_name(f"{self.directory.name}.{name}")

    def events(self) -> list[str]:
        """What the victim was about to do, the last of which it did not do if it was killed."""
        return self.beside("events").read_text().splitlines()


def die_at(run: KilledRun) -> None:
    """From now on write down everything that this process does to the run directory, and die at the chosen point."""
    root = str(run.directory)
    log = os.open(run.beside("events"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    count = 0

    def reached(what: str, path: str, goal: str = "") -> None:
        nonlocal count
        if path != root and not path.startswith(f"{root}/"):
            return
        os.write(log, f"{what} {path.removeprefix(root)} {goal.removeprefix(root)}\n".encode())
        if count == run.point:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def audit(event: str, args: tuple[object, ...]) -> None:
        if event not in WATCHED or isinstance(args[0], int):
            return
        if event == "open" and args[2] & os.O_ACCMODE == os.O_RDONLY:  # type: ignore[operator]
            return
        path = os.fsdecode(os.fspath(args[0]))  # type: ignore[call-overload]
        folder = args[-1] if event != "open" and isinstance(args[-1], int) else -1
        if folder >= 0:
            path = f"{os.readlink(f'/proc/self/fd/{folder}')}/{path}"
        reached(event, path, str(args[1]) if event == "os.rename" else "")

    fsync = os.fsync

    @functools.wraps(fsync)
    def watched_fsync(descriptor: int) -> None:
        reached("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    os.fsync = watched_fsync
    sys.addaudithook(audit)


def run_rank(rank: int, run: KilledRun) -> None:
    """The life of one rank; it never returns."""
    log = os.open(run.beside(f"rank-{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.dump_traceback_later(58)  # where it hangs, if it does, is in the log; this can crash one that runs
    signal.alarm(60)  # whatever happens, no rank outlives the test
    status = 1
    try:
        torch.set_num_threads(1)
        store = f"file://{run.beside('store')}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=30))
        if rank == run.victim:
            die_at(run)
        run.train()
        finish()
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def run_ranks(run: KilledRun) -> list[int]:
    """Fork the ranks and wait for all of them; how each ended: its exit status, or minus the signal."""
    run.beside("store").unlink(missing_ok=True)
    ranks = {}
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            run_rank(rank, run)
        ranks[pid] = rank
    ends: dict[int, int] = {}
    while len(ends) < RANKS:
        pid, status = os.wait()
        ends[ranks[pid]] = os.waitstatus_to_exitcode(status)
        if status and not run.spare_others:
            for other, rank in ranks.items():
                if rank not in ends:
                    os.kill(other, signal.SIGKILL)
    return [ends[rank] for rank in range(RANKS)]


def serve(connection: Connection) -> None:
    """Do runs until told to stop."""
    import torch._dynamo  # the first fully_shard and the first optimizer want it, which would take each rank a second
    import torch.profiler  # noqa: F401

    import tests.frozen  # noqa: F401

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while (run := connection.recv()) is not None:
        connection.send(run_ranks(run))


class Server:
    """Starts runs in a process that has threads of neither Gloo nor pytest."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def run(self, run: KilledRun) -> list[int]:
        self._connection.send(run)
        return self._connection.recv()  # type: ignore[no-any-return]
