"""Errors of the disk, and ranks that raise or die, at every point of a save and an export, one after the other."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from shardsmith.ground import ranks as ranks_module
from shardsmith.hooks import finish
from tests.soak.forked import HUNG, start_ranks, wait_for
from tests.soak.job import Job, attach, look, steps_in

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES)
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
STEPS = (2, 3, 4)
"""Saved and exported each; the last removes the first."""


@dataclass(frozen=True)
class Injection:
    """What goes wrong, and where."""

    kind: Literal["disk", "raise", "exit"]
    victim: int
    point: int
    """The how-manieth event of the victim, from 0."""
    error: int = 0
    is_lasting: bool = False
    """Whether every event after it fails, too, until the step is over."""


def inject_all(work: Path, kind: Literal["disk", "raise", "exit"], until: float, first_error: int = 0) -> Counter[str]:
    """Every point of both ranks, to the end or until a time of ``time.monotonic``. Errors of the disk take turns."""
    found: Counter[str] = Counter()
    lasting_or_not = (False, True) if kind == "disk" else (False,)
    open_ways = [(victim, lasting) for victim in (0, 1) for lasting in lasting_or_not]
    point = 0
    while open_ways and time.monotonic() < until:
        for way in [*open_ways]:
            if time.monotonic() > until:
                break
            victim, lasting = way
            error = ERRORS[(first_error + point + 2 * lasting) % len(ERRORS)]
            if not _one(work, Injection(kind, victim, point, error, lasting), found):
                open_ways.remove(way)
        point += 1
    found[f"{kind}: ways not tried to their last point"] += len(open_ways)
    return found


def _one(work: Path, injection: Injection, found: Counter[str]) -> bool:
    """One job of two ranks. False if the point lies behind the last event."""
    job = Job(work / f"{injection.kind}-{injection.victim}-{injection.point}", 2, STEPS[-1])
    job.folder.mkdir(parents=True)
    started = time.monotonic()
    pids = start_ranks(2, partial(_train, job, injection), job.folder / "log", job.folder / "store")
    ends = wait_for(pids, 100)
    was_reached = (job.folder / "reached").exists()
    if was_reached:
        found[f"{injection.kind}: injected"] += 1
        check = _check_exit if injection.kind == "exit" else _check_errors
        for fault in check(job, injection, ends, time.monotonic() - started, found):
            found[f"fault: {injection.kind}: {fault.partition(':')[0]}"] += 1
            print(f"fault: {injection}: {fault}", flush=True)
    shutil.rmtree(job.folder)
    return was_reached


def _train(job: Job, injection: Injection) -> None:
    """What each rank does: what failed at which step goes into a file."""
    logging.disable()
    attached = attach(job, timeout_secs=300)
    rank = dist.get_rank()
    outcome: list[list[str | None]] = []
    arm = _armed(job, injection) if rank == injection.victim else contextlib.nullcontext()
    with arm as is_active:
        for step in STEPS:
            if is_active is not None:
                is_active.append(step)
            attached.step()
            outcome.append(
                [_error(partial(_save, attached.save, step)), _error(partial(_export, attached.export, step))]
            )
            if is_active and (job.folder / "reached").exists():
                is_active.clear()
                is_active = None
    attached.hooks.close()
    (job.folder / f"outcome.{rank}").write_text(json.dumps(outcome))
    finish()


def _save(save: Any, step: int) -> None:
    save.save(step)
    save.saving(step).exception()  # so that it has ended
    save.report_background()


def _export(export: Any, step: int) -> None:
    export.export(step)
    export.wait()


def _error(act: Callable[[], None]) -> str | None:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@contextlib.contextmanager
def _armed(job: Job, injection: Injection) -> Iterator[list[int]]:
    """Count the events of this process, and let the chosen one fail, while the list that is given holds anything."""
    active: list[int] = []
    count = 0

    def event() -> bool:
        nonlocal count
        if not active:
            return False
        hit = count == injection.point or (injection.is_lasting and count > injection.point)
        count += 1
        if hit and not (job.folder / "reached").exists():
            Path(job.folder / "reached").touch()
        return hit

    if injection.kind == "disk":
        _break_disk(job, event, injection.error)
    else:
        _break_phases(event, injection.kind)
    yield active
    active.clear()


def _break_disk(job: Job, event: Callable[[], bool], error: int) -> None:
    places = (f"{job.checkpoints}/", f"{job.exports}/")

    def fail_at(path: str) -> None:
        if path.startswith(places) and event():
            raise OSError(error, os.strerror(error), path)

    def audit(name: str, args: tuple[Any, ...]) -> None:
        if name in EVENTS and not isinstance(args[0], int):
            folder = args[-1] if name != "open" and isinstance(args[-1], int) and args[-1] >= 0 else None
            path = os.fsdecode(os.fspath(args[0]))
            fail_at(path if folder is None else f"{os.readlink(f'/proc/self/fd/{folder}')}/{path}")

    def broken(call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(descriptor: int, *args: Any) -> Any:
            fail_at(os.readlink(f"/proc/self/fd/{descriptor}"))
            return call(descriptor, *args)

        return instead

    for name in ("fsync", "write", "pwrite", "preadv"):
        setattr(os, name, broken(getattr(os, name)))
    sys.addaudithook(audit)


def _break_phases(event: Callable[[], bool], kind: str) -> None:
    """Every phase in which ranks wait for each other runs its part through one function."""
    attempt = ranks_module._attempt

    def instead(phase: str, body: Callable[[], Any], *, large: bool) -> Any:
        def broken() -> Any:
            if kind == "exit":
                os._exit(9)
            raise ZeroDivisionError(f"injected into {phase}")

        return attempt(phase, broken if event() else body, large=large)

    ranks_module._attempt = instead


def _check_errors(
    job: Job, injection: Injection, ends: list[int | str], seconds: float, found: Counter[str]
) -> Iterator[str]:
    """The same on both ranks, nothing torn or left, and what is said to be there is; afterwards everything works."""
    if ends != [0, 0]:
        logs = "".join((job.folder / f"log.{rank}").read_text()[-2000:] for rank in range(2))
        yield f"ended with {ends}: after {seconds:.0f} s {logs}"
        return
    one, other = (json.loads((job.folder / f"outcome.{rank}").read_text()) for rank in range(2))
    failed = [[bool(error) for error in step] for step in one]
    found[f"{injection.kind}: errors on both ranks"] += sum(map(sum, failed))
    found[f"{injection.kind}: rightly none"] += not any(map(any, failed))
    if failed != [[bool(error) for error in step] for step in other]:
        yield f"on one rank alone: {one} {other}"
    if any(map(any, failed[:-1])) and any(failed[-1]):
        yield f"later steps failed: {one}"
    for kind, place in enumerate((job.checkpoints, job.exports)):
        there = {int(path.name.removeprefix("step-")) for path in steps_in(place)}
        did_fail = {step for step, outcome in zip(STEPS, failed, strict=True) if outcome[kind]}
        if wrong := (did_fail & there) | (set(STEPS[1:]) - did_fail - there):
            yield f"false outcome: steps {wrong} of {place.name} are there and failed, or the reverse"
    yield from (f"torn: {line}" for line in look(job, {}))
    if left := job.leftovers():
        found[f"{injection.kind}: something left until the next start"] += bool(left)


def _check_exit(
    job: Job, injection: Injection, ends: list[int | str], seconds: float, found: Counter[str]
) -> Iterator[str]:
    """The survivor ends, soon; nothing is torn."""
    survivor = ends[1 - injection.victim]
    found["exit: survivors that ended"] += survivor != HUNG
    if survivor == HUNG or seconds > 45:
        yield f"survivor: {survivor} after {seconds:.0f} s"
    yield from (f"torn: {line}" for line in look(job, {}))
