"""Ranks are killed at random times while they save, export, remove and resume; the run always comes to its end."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.soak.forked import wait_for
from tests.soak.job import EXPORT_EVERY, KEPT, SAVE_EVERY, Digests, Job, look, steps_in

STEPS = 8
KILLS_OF_A_RUN = 6


def kill_at_random(
    work: Path, kills: int, until: float, chance: random.Random, make: Callable[[Path, int, int], Job] = Job
) -> Counter[str]:
    """Kill runs of 1, 2 and 4 ranks, ``kills`` times or until a time of ``time.monotonic``.

    ``make`` makes a job of a folder, a number of ranks and of steps.

    Returns what happened, by name; whatever begins with "fault" must not.
    """
    found: Counter[str] = Counter()
    expected: Digests = {}
    lengths = {ranks: _undisturbed(work, ranks, expected, make) for ranks in (1, 2, 4)}
    number = 0
    while found["kills"] < kills and time.monotonic() < until:
        number += 1
        job = make(work / f"run-{number}", chance.choice((1, 2, 4)), STEPS)
        for _ in range(KILLS_OF_A_RUN):
            if not _kill_once(job, lengths[job.ranks], chance, found, expected):
                break
        faults = sum(found[name] for name in found if name.startswith("fault"))
        _finish_run(job, found, expected)
        if faults == sum(found[name] for name in found if name.startswith("fault")):
            shutil.rmtree(job.folder)  # else it stays, to be looked at
    return found


def _undisturbed(work: Path, ranks: int, expected: Digests, make: Callable[[Path, int, int], Job]) -> float:
    """Train bit by bit, so that every step directory is seen before it is removed; how long a run takes."""
    for steps in range(SAVE_EVERY * KEPT, STEPS + 1, SAVE_EVERY * KEPT):
        job = make(work / f"straight-{ranks}", ranks, steps)
        job.run()
        assert look(job, expected) == []
    seen = [name for name in expected if name.startswith(f"{ranks}/")]
    assert len(seen) == STEPS // SAVE_EVERY + STEPS // EXPORT_EVERY, seen
    whole = make(work / f"whole-{ranks}", ranks, STEPS)
    started = time.monotonic()
    whole.run()
    seconds = time.monotonic() - started
    for one in (job, whole):
        shutil.rmtree(one.folder)
    return seconds


def _kill_once(job: Job, length: float, chance: random.Random, found: Counter[str], expected: Digests) -> bool:
    """Run it and kill all ranks, or one and later the others. False if it had ended before."""
    before = job.committed()
    (job.folder / "resumed").unlink(missing_ok=True)
    pids = job.start()
    victims = pids if chance.random() < 0.5 else [chance.choice(pids)]
    time.sleep(chance.uniform(0.1, length))  # the random time; nothing is waited for
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    if victims != pids:
        time.sleep(chance.uniform(0, 0.5))  # a launcher takes its time, too
    for pid in set(pids) - set(victims):
        os.kill(pid, signal.SIGKILL)
    ends = wait_for(pids, 30)
    if all(end == 0 for end in ends):
        return False
    found["kills"] += 1
    found[f"kills of {job.ranks} ranks"] += 1
    found["kills that left something half-made"] += bool(job.leftovers())
    resumed = job.folder / "resumed"
    if resumed.exists() and resumed.read_text() and int(resumed.read_text()) != max(before, default=0):
        _fault(found, "fault: resumed at another step than the newest", f"{job.folder} {before} {resumed.read_text()}")
    for problem in look(job, expected):
        _fault(found, "fault: torn or wrong after a kill", problem)
    return True


def _finish_run(job: Job, found: Counter[str], expected: Digests) -> None:
    """Let it come to its end, and find everything there and nothing else."""
    try:
        job.run()
    except AssertionError as error:
        _fault(found, "fault: a run that could not go on", str(error))
        return
    found["runs that came to their end"] += 1
    for problem in look(job, expected):
        _fault(found, "fault: torn or wrong at the end", problem)
    if left := job.leftovers():
        _fault(found, "fault: leftovers at the end", str(left))
    seen = job.visible()
    found["directories looked at"] += len(steps_in(seen.checkpoints)) + len(steps_in(seen.exports))
    if not (seen.checkpoints / f"step-{STEPS}").is_dir():
        _fault(found, "fault: the last step is missing", str(job.folder))


def _fault(found: Counter[str], name: str, text: str) -> None:
    found[name] += 1
    print(f"{name}: {text}", flush=True)
