"""Exports that come straight from the live weights."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from shardsmith.errors import RankTimeoutError
from shardsmith.export.joint_export import JointExport
from shardsmith.export.live import LiveExporter, LiveModel
from shardsmith.export.live_writers import WeightsWriter
from shardsmith.ground.ranks import Ranks
from shardsmith.run_state.alike import ReplicaCheck, compare_replicas
from shardsmith.sharding.live_boxes import StagingBuffer
from shardsmith.sharding.step_copies import StepCopies

from .live_directory import LiveDirectory
from .live_state import LiveState
from .overlap import OpenCopy

log = logging.getLogger(__name__)

Target = tuple[LiveDirectory, Path]
"""One of the directories of a step, and where it is to appear."""
Begin = Callable[[contextlib.ExitStack], list[JointExport]]
"""What the background thread begins with: the directories of a step, ready to be written. The stack takes what is to be
undone when they are."""


class LiveSource:
    """Copies the live weights, each rank its own part, while the training waits."""

    def __init__(
        self,
        state: LiveState,
        ranks: Ranks,
        writer_ranks: Ranks,
        writer: WeightsWriter,
        *,
        copy: OpenCopy,
        compare_replicas: Literal["first", "never"] | int = "first",
    ) -> None:
        """``ranks`` serves the main thread, ``writer_ranks`` and ``writer`` the one that writes.

        ``copy``: takes what is copied while the training goes on, if that is wanted.
        """
        self._state = state
        self._ranks = ranks
        self._writer_ranks = writer_ranks
        self._writer = writer
        self._copy = copy
        self._exporter = LiveExporter(ranks)
        self._replicas = ReplicaCheck(ranks, compare_replicas)
        self._begun: list[JointExport] = []

    def begin(
        self, step: int, targets: Sequence[Target], buffers: Sequence[StagingBuffer], step_copies: StepCopies | None
    ) -> Begin:
        """Copy what goes into these directories and is not in ``step_copies``. All ranks, main thread; communicates.

        Raises:
            RankFailedError: on all ranks, if any could not stage its part.
            RanksDisagreeError: on all ranks, if replicas are compared, and differ.
        """
        is_to_compare = self._replicas.is_due()
        # Until all directories of the step are staged, nothing of ours changes weights or average.
        jobs: list[JointExport] = []
        with contextlib.ExitStack() as unfinished, contextlib.ExitStack() as unchanged:
            for target, buffer in zip(targets, buffers, strict=True):
                jobs.append(self._stage(step, target, buffer, unchanged, is_to_compare, step_copies))
                unfinished.callback(jobs[-1].stop)
            unfinished.pop_all()
        self._copy.begin(*jobs)
        self._begun = jobs
        return partial(_opened, jobs)

    def feed(self) -> None:
        """Copy what is being written, where it could not be copied whole. Main thread; no communication."""
        jobs, self._begun = self._begun, []
        for job in jobs:
            job.feed()

    def is_possible(self, directories: Sequence[LiveDirectory]) -> bool:
        """Decide who would write what, as the first export does; False, with a warning, if that fails.

        All ranks, main thread; communicates. Raises RankTimeoutError.
        """
        try:
            for directory in directories:
                collect = partial(self._state.models, directory)
                self._exporter.begin("trying to export the live weights", directory.suffix, collect)
        except RankTimeoutError:
            raise
        except Exception as error:  # of whatever kind of tensor they are
            log.warning("the live weights cannot be exported, so the checkpoints will be: %s", error)
            return False
        return True

    def _stage(
        self,
        step: int,
        target: Target,
        buffer: StagingBuffer,
        unchanged: contextlib.ExitStack,
        is_to_compare: bool,
        step_copies: StepCopies | None,
    ) -> JointExport:
        directory, path = target
        models: list[LiveModel] = []

        def collect() -> list[LiveModel]:
            unchanged.enter_context(self._state.staging())
            models.extend(self._state.models(directory))
            if self._ranks.is_leader:  # which writes the config
                self._state.follow(models)
            return models

        phase = f"collecting {path.name}"
        plans, boxes = self._exporter.begin(phase, directory.suffix, collect)
        if is_to_compare:
            compare_replicas(self._ranks, phase, lambda: self._state.replicated(models), "exported")
        job = JointExport(self._state.plan(path, step, directory, plans), self._writer_ranks, self._writer)
        later = self._state.changed_by_steps(models) if self._copy.is_wanted else None
        job.stage(boxes, buffer, self._ranks, later, step_copies)
        return job


def _opened(jobs: list[JointExport], unfinished: contextlib.ExitStack) -> list[JointExport]:
    for job in jobs:  # of two directories the second is never written if the first fails, and would be fed for ever
        unfinished.callback(job.stop)
    return jobs
