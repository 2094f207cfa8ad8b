"""Which steps of a cached run can be loaded, and from where: the hosts' own disks, or the store. Rank 0 decides."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from shardsmith.errors import StorageError
from shardsmith.ground.layout import step_name
from shardsmith.ground.remote_commit import attempt_of_any
from shardsmith.ground.remote_path import RemotePath
from shardsmith.manifest.checkpoints import committed_steps

log = logging.getLogger(__name__)

Where = Literal["local", "store", "upload", "away"]
"""From the disks; from the store; from there, once it was put there; from the store, which cannot be asked."""
Held = Mapping[int, Sequence[dict[str, Any] | None]]
"""Step -> what each disk has of it, as ``files_of`` says; None where it has nothing."""


def choose_places(
    folder: Path, store: RemotePath, said: Sequence[dict[str, Any]], *, needs_store: bool
) -> tuple[list[tuple[int, list[Where]]], int | None]:
    """Return the steps, ascending, each with the places to load it from, the best first. Rank 0.

    Args:
        folder: Where the steps are on each host.
        store: Where they go.
        said: Of each rank, what its disk has, and whether it speaks for it.
        needs_store: Raise if the store cannot be asked, whatever the disks have.

    Returns:
        Steps and places; and the step from which the run has gone on, or does now, without the store having been
        asked; None now that it was.

    Raises:
        StorageError: it cannot be asked, and the disks do not suffice.
    """
    # Ranks that share a disk see the same steps: one of them speaks for it.
    disks = [of_rank["steps"] for of_rank in said if of_rank["is_leader"]]
    # The keys are numbers as text: what ranks tell each other is JSON.
    names = sorted({name for disk in disks for name in disk}, key=int)
    held = {int(name): [disk.get(name) for disk in disks] for name in names}
    alone_since = min((one["alone_since"] for one in said if one["alone_since"] is not None), default=None)
    try:
        return _with_store(store, held, alone_since), None
    except StorageError as error:
        if needs_store or not error.transient:
            raise
        newest = _newest_without_store(folder, store, held, error)
        return [(newest, ["local", "away"])], newest if alone_since is None else alone_since


def find_other_run(store: RemotePath, alone_since: int, own: Mapping[int, str]) -> int | None:
    """Return a step that another run has put into a store after this one went on alone; None if there is none.

    Args:
        store: The place of the steps.
        alone_since: The step from which this run went on.
        own: The attempts of the steps that the disks have.

    Raises:
        StorageError: it cannot be asked.
    """
    for step in reversed(committed_steps(store)):
        # Of the steps after that one, and that one itself if the disks have it, each in the store must be our own.
        is_known = step in own or step > alone_since
        if step >= alone_since and is_known and attempt_of_any(store / step_name(step)) != own.get(step):
            return step
    return None


def _with_store(store: RemotePath, held: Held, alone_since: int | None) -> list[tuple[int, list[Where]]]:
    if alone_since is not None:
        # The attempt tells two runs apart that have saved a step of the same number.
        own = {step: one["attempt"] for step, disks in held.items() for one in disks if one is not None}
        if (other := find_other_run(store, alone_since, own)) is not None:
            log.warning(
                "%s has step %d of another run. What this one has saved after step %d, while the store could not be "
                "asked, is passed over: %s",
                *(store, other, alone_since, [step for step in held if step > alone_since]),
            )
            held = {step: disks for step, disks in held.items() if step <= alone_since}
    stored = committed_steps(store)
    chosen: list[tuple[int, list[Where]]] = []
    for step in sorted({*stored, *held}):
        where = _where(store / step_name(step), held.get(step, ()), is_stored=step in stored)
        if where == "local" and step in stored:
            chosen.append((step, ["local", "store"]))  # should the local one be damaged
        elif where is not None:
            chosen.append((step, [where]))
    return chosen


def _newest_without_store(folder: Path, store: RemotePath, held: Held, error: StorageError) -> int:
    """The newest step of the disks, if every disk has all of it: with an older one the run would go back."""
    newest = max(held, default=None)
    if newest is None or not _is_whole(held[newest]):
        disks = "have no step" if newest is None else f"do not each have all files of {step_name(newest)}, the newest"
        raise StorageError(
            str(store),
            f"could not be asked for its steps, and the disks of this job ({folder}) {disks}. Nothing was loaded; "
            f"start the process again when the store can be reached. {error}",
            transient=True,
        ) from error
    log.warning(
        "%s could not be asked for its steps. The run goes on from %s, the newest on the disks of this job, which is "
        "uploaded later. %s",
        *(store, folder / step_name(newest), error),
    )
    return newest


def _where(stored: RemotePath, held: Sequence[dict[str, Any] | None], *, is_stored: bool) -> Where | None:
    there = [one for one in held if one is not None]
    attempts = {one["attempt"] for one in there}
    if is_stored and attempts != {attempt_of_any(stored)}:
        return "store"  # those on the disks are of another run
    if _is_whole(held):
        return "local"
    if is_stored:
        return "store"
    # No disk has all files, but together they may: then the step can be put into the store, and read from there.
    # `wanted` is the number of files in the manifest.
    names = {name for one in there for name in one["files"]}
    return "upload" if len(attempts) == 1 and len(names) == there[0]["wanted"] else None


def _is_whole(held: Sequence[dict[str, Any] | None]) -> bool:
    """Whether every disk has all files of one and the same step."""
    # A rank may need files of any other rank, and reads from its own disk: so that must have all of them.
    there = [one for one in held if one is not None and len(one["files"]) == one["wanted"]]
    return len(there) == len(held) and len({one["attempt"] for one in there}) == 1
