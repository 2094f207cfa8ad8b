"""``finish``: end the process groups of a job in an order that cannot hang the interpreter.

A worker thread of Gloo drops the last collective's tensors after the training has its result, and needs the
interpreter's lock (GIL) for that. Whoever drops the last reference to the group waits for that worker while it holds
this lock: a deadlock, at ``destroy_process_group`` or when the interpreter is taken down. ``finish`` makes sure that
all collectives of all ranks are over and all workers are idle before any group goes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import itertools
import logging
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from shardsmith.errors import UsageError
from shardsmith.ground.liveness import SilenceError, await_keys, shared_connection
from shardsmith.ground.ranks import rank_and_size

log = logging.getLogger(__name__)

_numbers = itertools.count()
_WORKER = "pt_gloo_runloop"  # torch's name of the threads that run Gloo's collectives
_LOOK_SECS = 0.02  # longer than a thread waits before it asks for the GIL again, so one that waits is seen to move
_IDLE_SECS = 10.0
_ANSWER_SECS = 10.0
_LONGEST_SECS = 1e9  # 30 years; threads cannot be waited for much longer, nor for ever
_DESTROY_SECS = 300.0
"""For the groups themselves, which take seconds; NCCL's of many hosts perhaps a minute."""


def finish(timeout_secs: float = 60.0) -> None:
    """End every process group of this process, the last thing that a training script does. All ranks; communicates.

    Call it after ``hooks.close()``, instead of ``dist.destroy_process_group()`` and before
    ``accelerator.end_training()``. Without a process group it does nothing.

    Args:
        timeout_secs: How long to wait for the other ranks. Then this rank ends its groups all the same, and logs which
            ranks did not come. If torch cannot end the groups within five minutes, the process ends with exit status 1
            and the stacks of its threads.

    Raises:
        UsageError: ``timeout_secs`` is no number above 0, or more than 1e9.
    """
    is_number = isinstance(timeout_secs, int | float) and not isinstance(timeout_secs, bool)
    if not is_number or not 0 < timeout_secs <= _LONGEST_SECS:
        wanted = f"a number of seconds above 0 is expected, {_LONGEST_SECS:g} at most"
        raise UsageError(f"finish: timeout_secs={repr(timeout_secs)[:80]}: {wanted}")
    if not (dist.is_available() and dist.is_initialized()):
        return
    meet(f"shardsmith/finish/{next(_numbers)}", timeout_secs)
    wait_for_idle_workers()  # before anything is freed that may hold the last reference to a group
    with _stopped_if_it_hangs():
        gc.collect()  # FSDP1 modules are reference cycles that hold groups
        wait_for_idle_workers()
        dist.destroy_process_group()
        gc.collect()


def wait_for_idle_workers() -> None:
    """Return when no worker thread of Gloo has anything left to do or to free, after 10 seconds at most.

    Linux only; elsewhere it returns at once, since threads cannot be looked at there.
    """
    deadline = time.monotonic() + _IDLE_SECS
    before, now = None, _worker_states()
    # Asleep at two looks, and not woken between them: then a worker has nothing left to do.
    while now != before or any(state != "S" for state, _ in now.values()):
        if time.monotonic() > deadline:
            log.warning("threads of Gloo are still at work; the process may hang at its end: %s", now)
            return
        time.sleep(_LOOK_SECS)  # with the GIL released, which is what a busy worker waits for
        before, now = now, _worker_states()


def meet(name: str, timeout_secs: float) -> None:
    """Wait until all ranks are here; rank 0, which may hold the store, until all others know that.

    All ranks; communicates through the store. Ranks that do not come, or have died, are logged by number on all others.

    Args:
        name: Of this meeting, unique in the job.
        timeout_secs: How long to wait for the others, and for the store.
    """
    rank, size = rank_and_size()
    if size == 1 or not dist.is_initialized():
        return
    problems: list[str] = []
    # A store whose host has stopped keeps whoever asks it for ever. The thread is left behind then, without the GIL.
    thread = threading.Thread(target=_meet, args=(name, rank, size, timeout_secs, problems), daemon=True)
    thread.start()
    # Two waits, for all to be here and for all to know it, and the store's answers.
    thread.join(2 * timeout_secs + _ANSWER_SECS)
    if thread.is_alive():
        problems = ["the job's store, which rank 0 or the launcher holds, does not answer"]
    for problem in problems:
        log.warning("not all ranks came to the end: %s", problem)


def _meet(name: str, rank: int, size: int, timeout_secs: float, problems: list[str]) -> None:
    others = range(1, size)
    try:
        store = shared_connection()
        if rank == 0:
            if missing := _await(store, f"{name}/here", others, timeout_secs):
                problems.append(f"{missing} within {timeout_secs:g} s")
            store.set(f"{name}/all", missing.encode())
            # Rank 0 leaves last: the store's server may live in its process.
            if not missing and (missing := _await(store, f"{name}/left", others, timeout_secs)):
                problems.append(f"{missing} any more")
        else:
            store.set(f"{name}/here/{rank}", b"")
            # rank 0 says which ranks are missing when its own time is over
            await_keys(store, [f"{name}/all"], [0], timeout_secs + _ANSWER_SECS)
            if missing := store.get(f"{name}/all").decode():
                problems.append(f"{missing} within {timeout_secs:g} s")
            else:
                store.set(f"{name}/left/{rank}", b"")
    except SilenceError as error:
        problems.append(f"rank 0: {error}")
    except RuntimeError as error:
        problems.append(f"the job's store: {error}")


def _await(store: Any, key: str, ranks: Sequence[int], timeout_secs: float) -> str:
    """Wait for a key of each rank; those that are missing, in words."""
    keys = {rank: f"{key}/{rank}" for rank in ranks}
    try:
        await_keys(store, [*keys.values()], ranks, timeout_secs)
    except SilenceError as error:
        missing = error.dead or [rank for rank in ranks if not store.check([keys[rank]])]
        return f"no word of rank {', '.join(map(str, missing))}: {error}" if missing else ""
    return ""


@contextlib.contextmanager
def _stopped_if_it_hangs() -> Iterator[None]:
    """End this process, with the stacks of its threads on stderr, if the body takes minutes.

    A group that is freed waits for its workers, and torch may hold the GIL meanwhile: no code in Python could end that.
    """
    try:
        # faulthandler needs a file descriptor, which a replaced `sys.stderr` may not have.
        faulthandler.dump_traceback_later(_DESTROY_SECS, exit=True, file=sys.__stderr__ or sys.stderr)
    except (AttributeError, ValueError, OSError):  # there is no file to write to
        yield
        return
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _worker_states() -> dict[str, tuple[str, str]]:
    """Thread -> its state and how often it went to sleep so far, of each worker of Gloo."""
    return dict(_looked_at()) if sys.platform == "linux" else {}


def _looked_at() -> Iterator[tuple[str, tuple[str, str]]]:
    for task in Path("/proc/self/task").iterdir():
        try:
            if (task / "comm").read_text().strip() == _WORKER:
                lines = (line.partition(":") for line in (task / "status").read_text().splitlines())
                fields = {name: value.split() for name, _, value in lines}
                yield task.name, (fields["State"][0], fields["voluntary_ctxt_switches"][0])
        except OSError:  # it has just ended
            continue
