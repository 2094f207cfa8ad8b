"""``Recorder``: step directories that a trainer writes in place become checkpoints of ours once they are whole."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from shardsmith.checking.arguments import checked
from shardsmith.checking.types import AsPath, Directory, Seconds, StepNumber
from shardsmith.errors import ShardsmithError
from shardsmith.formats.adopt import adopt, disown
from shardsmith.ground.commit import remove, sweep
from shardsmith.ground.layout import METADATA_FILE, parse_step, step_name
from shardsmith.ground.logs import Stopwatch
from shardsmith.ground.meeting import made_together, meet
from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.checkpoints import committed_steps
from shardsmith.manifest.retention import Retention, steps_to_remove
from shardsmith.manifest.retention_note import note_policy
from shardsmith.tensors.fqn import tied_weights

from .background import Background, SavesInFlight, logged
from .disk_space import mind_disk
from .ema import EMA
from .events import Event, event_of
from .hook import Hook
from .wiring import Parts, alike

log = logging.getLogger(__name__)


class Recorder(Hook):
    """Add ``metadata.json`` to a trainer's ``step-<n>`` directories, as the last file: the mark of a complete one.

    The trainer tells it when a save begins and, right after, how to know that it has ended. A background thread waits
    for that end, reads the files back, divided among the ranks, records them, and removes what is not to be kept. It
    does not make the directory, since trainers take its being there for a run to go on with.

    Attributes:
        directory: Where the step directories are; absolute, so that a later ``os.chdir`` changes nothing.
    """

    @made_together
    @checked
    def __init__(
        self,
        directory: Directory,
        *,
        model: nn.Module,
        ema: EMA | None = None,
        keep: Retention | None = None,
        names: Mapping[str, Any] | None = None,
        timeout_secs: Seconds = 1800.0,
    ) -> None:
        """Make it on all ranks at the same point. Communicates through the store.

        Args:
            directory: Where the trainer makes its step directories.
            model: For what is to be said of it; no weight is read.
            ema: Whose facts are recorded, where it is saved with the rest.
            keep: Which complete steps to retain; None keeps all. Of the others, what is older than all that
                are kept goes, once there are as many as that; the newest complete one never does.
            names: How the weights are called in Hugging Face files, as ``metadata.json`` has it. That of rank 0 counts.
            timeout_secs: How long to wait for a rank, its save included, before a recording is given up.
        """
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._ema = ema
        self._tied = tied_weights(model)
        self._names = dict(names) if names is not None else None
        facts = alike(directory=self.directory, keep=keep, ema=ema and ema.settings())
        self.parts = Parts(model=model, average=ema, directory=self.directory, facts=facts)
        self._ranks = Ranks(timeout_secs)
        meet(self._ranks, "making Recorder", facts)
        self._writer_ranks = Ranks(timeout_secs)  # for the thread that writes
        self.background: Background = Background("shardsmith-record")
        self._in_flight = SavesInFlight(self.background, self._announce_save)
        # What a deletion of a former run has left half done.
        self._ranks.lead(f"preparing {self.directory}", lambda: len(sweep(self.directory)))

    @checked
    def begin(self, path: AsPath) -> None:
        """Note that a save into ``path`` begins: a directory that is there already loses its manifest.

        All ranks, before anything is written; communicates through the store. Raises RankFailedError.
        """
        # Without its manifest it does not count as complete while the trainer writes into it.
        self._ranks.lead(f"preparing {path.name}", lambda: path.exists() and disown(path))

    @checked
    def saved(
        self,
        step: StepNumber,
        path: AsPath,
        end: Future[Any] | None,
        mesh: Mapping[str, Any] | None = None,
        *,
        has_average: bool = True,
        has_manifest: bool = False,
    ) -> None:
        """Add the manifest when the save that began has ended. All ranks; returns at once.

        Args:
            step: Number of the step.
            path: The step's directory.
            end: The save in flight; None once it has ended.
            mesh: As ``metadata.json`` has it.
            has_average: Whether the average was saved with the rest, if there is one.
            has_manifest: Whether the save itself adds the manifest; then nothing is read back.
        """
        facts = self._ema.facts() if self._ema is not None and has_average else None
        watch = Stopwatch()
        distance = self._ema.distance() if self._ema and facts and self.is_heard else None
        self._in_flight.start(step, partial(self._record, step, path, end, facts, mesh, watch, has_manifest, distance))
        watch.released()

    def on_train_begin(self, step: int) -> None:  # noqa: ARG002
        """Write down what is kept, on rank 0. No communication."""
        if self._ranks.is_leader:
            self._note_policy()

    def on_step_end(self, step: int) -> None:  # noqa: ARG002
        """Announce recordings that have ended. All ranks; no communication."""
        self._in_flight.announce_ended()

    def report_background(self) -> None:
        """Announce recordings that have ended, up to the first that failed; raise what failed in it."""
        self._in_flight.raise_ended()

    def close(self) -> None:
        """Wait for the recordings under way; raise what failed in them."""
        try:
            self._in_flight.wait()
        finally:
            self.background.close()

    def _record(
        self,
        step: int,
        path: Path,
        end: Future[Any] | None,
        ema: dict[str, Any] | None,
        mesh: Mapping[str, Any] | None,
        watch: Stopwatch,
        has_manifest: bool,
        distance: float | None,
    ) -> Path:
        """In the background thread."""
        ranks = self._writer_ranks
        try:
            # On all ranks: a save has ended when each part of it has. Its result may be no JSON, and is not told.
            ranks.gather(f"saving {path.name}", lambda: end is not None and end.result() is None)
            if not has_manifest:
                found = dict(mesh) if mesh else None
                adopt(path, step=step, ema=ema, tied=self._tied, mesh=found, names=self._names, ranks=ranks)
        except BaseException as error:
            log.exception("%s was not recorded: it does not count as complete", path)  # also if nobody asks
            self.emit(event_of("save", step, path, watch, ranks.size, error))
            raise
        if ranks.is_leader:
            with logged(f"measuring {path}"):
                self.emit(event_of("save", step, path, watch, ranks.size, ema_distance=distance))
            self._remove_old()
        return path

    def _note_policy(self) -> None:
        with logged(f"writing down what is kept in {self.directory}"):
            note_policy(self.directory, self.keep, METADATA_FILE)

    def _remove_old(self) -> None:
        self._note_policy()
        complete = committed_steps(self.directory)
        going = steps_to_remove(self.keep, complete, directory=self.directory)
        kept = sorted(set(complete).difference(going))
        if self.keep is not None and len(kept) >= self.keep.newest:
            going += [step for step in self._all_steps() if step < kept[0] and step not in complete]
        for step in going:
            self._remove(step)
        mind_disk(self, self.keep, self.directory, committed_steps(self.directory), self._remove)

    def _remove(self, step: int) -> None:
        path = self.directory / step_name(step)
        try:
            if remove(path, nameless=True):
                self.emit(Event(kind="remove", step=step, path=str(path)))
            else:
                log.info("%s is being read; it is removed later", path)
        except ShardsmithError as error:  # the new one is there all the same, and the next one tries again
            log.warning("could not remove an old checkpoint: %s", error)

    def _all_steps(self) -> list[int]:
        """Those of all step directories, complete or not."""
        steps = (parse_step(path.name) for path in self.directory.iterdir() if os.path.isdir(path))
        return sorted(step for step in steps if step is not None)
