"""Commands that torchrun starts several times: the processes find each other, and plan the same."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import xxhash

from shardsmith.errors import RanksDisagreeError
from shardsmith.export.plan import ExportPlan
from shardsmith.torchrun.process import was_started_by_torchrun
from shardsmith.torchrun.team import Alone, Team

TIMEOUT_SECS = 600.0


@contextlib.contextmanager
def team_of_torchrun() -> Iterator[Team]:
    """The processes that torchrun has started, or this one alone."""
    if not was_started_by_torchrun():
        yield Alone()
        return
    from shardsmith.torchrun.group import joined_ranks  # half a second of imports that a single process does not need

    with joined_ranks(TIMEOUT_SECS) as ranks:
        yield ranks


def threads_per_process() -> int | None:
    """How many threads each process of this host may use; None for one process, which finds out itself."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if was_started_by_torchrun() else 1
    return None if local == 1 else max(1, (os.cpu_count() or 1) // local)


def plan_together(team: Team, make: Callable[[], list[ExportPlan]]) -> list[ExportPlan]:
    """The plans of every rank, which are equal: rank 0 makes them first, so that what is wrong is said once.

    Raises:
        RanksDisagreeError: this rank would make other files.
        RankFailedError: on all ranks, if planning failed on any. With one rank, the original error.
    """
    plans: list[ExportPlan] = []

    def plan() -> str:
        plans.extend(make())
        return _signature(plans)

    wanted = team.lead("planning", plan)

    def follow() -> None:
        if not plans and plan() != wanted:
            raise RanksDisagreeError("would make other files than rank 0; give all processes the same arguments")

    team.gather("planning", follow)
    return plans


def _signature(plans: list[ExportPlan]) -> str:
    files = [file for plan in plans for model in plan.directory.models for file in model.weights.files]
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.header)
    return digest.hexdigest()
