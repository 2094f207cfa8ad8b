"""Commands that torchrun starts several times: the processes find each other, and plan the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import xxhash

from shardsmith.errors import RanksDisagreeError
from shardsmith.export.plan import ExportPlan
from shardsmith.ground.torchrun.process import was_started_by_torchrun
from shardsmith.ground.torchrun.team import Alone, Team

# Seconds: a plan may import transformers and read headers from a slow file system.
TIMEOUT_SECS = 600.0


@contextlib.contextmanager
def team_of_torchrun() -> Iterator[Team]:
    """The processes that torchrun has started, or this one alone."""
    if not was_started_by_torchrun():
        yield Alone()
        return
    from shardsmith.ground.torchrun.group import (
        joined_ranks,  # half a second of imports that a single process does not need
    )

    with joined_ranks(TIMEOUT_SECS) as ranks:
        yield ranks


def plan_together(team: Team, make: Callable[[], list[ExportPlan]]) -> list[ExportPlan]:
    """Return the plans of every rank, which are equal: rank 0 makes them first, so that what is wrong is said once.

    Raises:
        RanksDisagreeError: this rank would make other files.
        RankFailedError: on all ranks, if planning failed on any. With one rank, the original error.
    """
    plans: list[ExportPlan] = []

    def plan() -> str:
        plans.extend(make())
        return _signature(plans)

    # Rank 0 first and alone: what is wrong with the arguments is said once, not by each rank.
    wanted = team.lead("planning", plan)

    def follow() -> None:
        if not plans and plan() != wanted:
            raise RanksDisagreeError("would make other files than rank 0; give all processes the same arguments")

    team.gather("planning", follow)
    return plans


def _signature(plans: list[ExportPlan]) -> str:
    files = [file for plan in plans for model in plan.directory.models for file in model.weights.files]
    digest = xxhash.xxh3_128()
    # Names and headers: they say where every byte of every file goes, so equal ones make equal files.
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.header)
    return digest.hexdigest()
