"""Exports that come from the run's own checkpoints instead of its live weights."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from shardsmith.errors import CheckpointNotFoundError, MismatchError, UsageError
from shardsmith.export.base_comparison import advice_of_hooks
from shardsmith.export.checkpoint_writer import CheckpointWriter
from shardsmith.export.joint_export import JointExport
from shardsmith.ground.layout import step_name
from shardsmith.ground.leases import hold
from shardsmith.ground.ranks import Ranks
from shardsmith.sharding.live_boxes import StagingBuffer
from shardsmith.sharding.step_copies import StepCopies

from .live_source import Begin, Target
from .live_state import LiveState
from .schedule import Schedule


class Saves(Protocol):
    """What saves the checkpoints: ``ShardedSave``, or anything with the same two."""

    directory: Path
    """Where the step directories are."""
    when: Schedule
    """The steps that it saves."""

    def saving(self, step: int) -> Future[Path]:
        """The save of a step, in flight or done: the directory, once it is committed. Raises UsageError without one."""
        ...


class HeldCheckpoint:
    """The checkpoint of one step, protected from retention from the moment it is committed until it is released."""

    def __init__(self, target: Path, saving: Future[Path]) -> None:
        self._target = target
        self._lease = contextlib.ExitStack()
        self._held: Future[Path] = Future()
        saving.add_done_callback(self._hold)

    def path(self) -> Path:
        """Wait until it is committed; its directory. Raises CheckpointNotFoundError if it could not be saved."""
        try:
            return self._held.result()
        except Exception as error:
            raise CheckpointNotFoundError(self._target, f"was not saved: {type(error).__name__}: {error}") from error

    def release(self) -> None:
        """Let retention have it."""
        self._lease.close()

    def _hold(self, saving: Future[Path]) -> None:
        """In the thread that saves, at once: a later save, which might remove it, has not begun to write."""
        try:
            path = saving.result()
            self._lease.enter_context(hold(path))
            self._held.set_result(path)
        except Exception as error:
            self._held.set_exception(error)


class CheckpointSource:
    """Makes the directories of a step from its checkpoint, a share on every rank."""

    def __init__(
        self, saves: Saves, state: LiveState, ranks: Ranks, writer_ranks: Ranks, *, when: Schedule, whole_files: bool
    ) -> None:
        """``ranks`` serves the main thread, ``writer_ranks`` the one that writes and commits.

        Raises:
            UsageError: ``when`` has steps that are never saved.
        """
        if getattr(saves, "local_cache", None) is not None:
            raise UsageError(
                "exports from checkpoints need steps that all ranks see, and ShardedSave(local_cache=...) has them on "
                "the hosts' own disks: export live weights, or run `shardsmith watch` on the steps in the store"
            )
        if (missing := when.outside(saves.when)) is not None:
            raise UsageError(
                f"exports from checkpoints are due at {missing}, but checkpoints are saved at {saves.when}: "
                "export steps that are saved, or export live weights"
            )
        self._saves = saves
        self._state = state
        self._main_ranks = ranks
        self._ranks = writer_ranks
        self._whole_files = whole_files

    def begin(
        self,
        step: int,
        targets: Sequence[Target],
        buffers: Sequence[StagingBuffer],  # noqa: ARG002
        step_copies: StepCopies | None,  # noqa: ARG002
    ) -> Begin:
        """Decide that the directories are made of the step's checkpoint. All ranks, main thread; communicates.

        Raises:
            UsageError: the step is not saved; with several ranks as RankFailedError.
        """
        claims: list[HeldCheckpoint] = []  # on rank 0
        phase = f"looking for the checkpoint of {step_name(step)}"
        self._main_ranks.lead(phase, lambda: claims.append(self._claim(step)))
        return lambda unfinished: self._open(claims, step, targets, unfinished)

    def feed(self) -> None:
        """Do nothing: nothing is copied."""

    def _claim(self, step: int) -> HeldCheckpoint:
        """The checkpoint of a step, to be awaited. Rank 0; no communication."""
        try:
            return HeldCheckpoint(self._saves.directory / step_name(step), self._saves.saving(step))
        except UsageError as error:
            is_due = self._saves.when.due(step)
            advice = "Pass the hook that saves to Hooks before HFExport" if is_due else "Save it, too"
            raise UsageError(f"step {step} cannot be exported from its checkpoint: {error}. {advice}") from error

    def _open(
        self,
        claims: Sequence[HeldCheckpoint],
        step: int,
        targets: Sequence[Target],
        unfinished: contextlib.ExitStack,
    ) -> list[JointExport]:
        """Wait until a checkpoint is committed; the exports to be made. Background thread, all ranks; communicates.

        Raises:
            RankFailedError: on all ranks, if it was not saved, or cannot be read.
        """
        # First: whatever fails from here on, the checkpoint is released.
        for claim in claims:
            unfinished.callback(claim.release)
        path = self._ranks.lead(f"waiting for {step_name(step)} to be saved", lambda: str(claims[0].path()))
        jobs: list[JointExport] = []

        def plan() -> None:
            for directory, output in targets:
                compare = self._ranks.is_leader
                try:
                    plan, sources = self._state.plan_checkpoint(Path(path), output, directory, compare=compare)
                except MismatchError as error:
                    advice = advice_of_hooks(error, path)
                    raise MismatchError(path, error.summary, error.problems, advice) from None
                for source in sources.values():
                    unfinished.callback(source.close)
                rank, size = self._ranks.rank, self._ranks.size
                writer = CheckpointWriter(Path(path), sources, rank, size, whole_files=self._whole_files)
                jobs.append(JointExport(plan, self._ranks, writer))

        self._ranks.gather(f"opening {step_name(step)}", plan)
        return jobs


def check_source(source: str, checkpoints: Saves | None, *, is_adapter: bool) -> None:
    """Raise UsageError if the arguments of these names do not fit each other."""
    if source == "checkpoint" and checkpoints is None:
        raise UsageError('source="checkpoint" needs checkpoints=: pass the ShardedSave of the run')
    if source == "live" and checkpoints is not None:
        raise UsageError('checkpoints= is of no use to source="live": leave it out, or choose another source')
    if checkpoints is not None and is_adapter:
        raise UsageError("an adapter is exported from live weights only: leave source= and checkpoints= out")
