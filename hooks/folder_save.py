"""``FolderSave``: an average, hashes and digests inside the checkpoint folders of a trainer, and the way back."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from shardsmith.checking.arguments import checked
from shardsmith.checking.types import AsPath, Seconds, StepNumber
from shardsmith.errors import CheckpointNotFoundError, CorruptCheckpointError, MismatchError, UsageError
from shardsmith.formats.adopt import disown
from shardsmith.formats.folder import SHARDED_MODEL, LiveModel, record_folder
from shardsmith.ground.commit import remove, sweep
from shardsmith.ground.layout import COMPANION, FOLDER_FILE, step_name
from shardsmith.ground.logs import Stopwatch
from shardsmith.ground.meeting import made_together, meet
from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.checkpoints import find_damage, set_aside, why_unreadable
from shardsmith.manifest.companion import companion_of, is_complete, is_deserted, read_folder_record
from shardsmith.manifest.metadata import TensorRecord, read_metadata
from shardsmith.run_state.average import refuse_other_decay
from shardsmith.run_state.contents import Contents
from shardsmith.run_state.left_behind import LeftBehind, refuse_left_behind
from shardsmith.run_state.rehearsal import Rehearsal, refuse_without_copies
from shardsmith.run_state.resume import fill
from shardsmith.run_state.resume_parts import OnMissing
from shardsmith.run_state.save import SaveInProgress
from shardsmith.run_state.share import Share
from shardsmith.sharding.live_boxes import StagingBuffer
from shardsmith.sharding.live_digest import OTHER_VALUES, compare_digests, digest_live
from shardsmith.tensors.device_copy import release_pinned
from shardsmith.tensors.fqn import tied_weights

from .background import Background, SavesInFlight, logged
from .ema import EMA
from .events import event_of
from .hook import Hook
from .reload import reload
from .wiring import Parts, alike

log = logging.getLogger(__name__)

# Between two looks at a folder that a trainer deletes.
_DELETION_SECS = 0.5

_START = (
    'An average starts from the weights with on_missing="start", in CheckpointHooks(...) of the Trainer as in '
    "attach(...) of accelerate; without one, leave ema_decay or ema out."
)


class FolderSave(Hook):
    """Add the directory ``shardsmith`` to checkpoint folders of a trainer; see ``shardsmith.manifest.companion``.

    Call ``save`` when the trainer has written a folder, and ``load`` when it has loaded one. The trainer's files are
    only read; even the folder's modification time, by which some trainers choose what to delete, stays what it was.
    Make it on all ranks at the same point, after ``fully_shard`` / FSDP / DDP: it communicates.
    """

    @made_together
    @checked
    def __init__(
        self,
        model: nn.Module,
        *,
        ema: EMA | None = None,
        async_mode: Literal["async", "disabled"] = "async",
        prewarm: bool = False,
        timeout_secs: Seconds = 1800.0,
    ) -> None:
        """Prepare the saves. Nothing is written yet.

        Args:
            model: As the trainer wrapped it.
            ema: The average to save with each folder; None without one.
            async_mode: ``"async"`` copies the average to CPU memory, returns, and writes in the background, one folder
                at a time; ``"disabled"`` returns when our directory is there.
            prewarm: Allocate the memory of that copy, and agree on who writes what, after the first step instead of at
                the first save. Needs ``Hooks``, which tell of the step, and ``async_mode="async"``.
            timeout_secs: How long to wait for a rank before a save is given up.

        Raises:
            UsageError: ``prewarm`` without ``async_mode="async"``.
        """
        refuse_without_copies("FolderSave", prewarm=prewarm, has_copies=async_mode == "async")
        self._model = model
        self._ema = ema
        self._is_warm = not prewarm
        facts = alike(async_mode=async_mode, prewarm=prewarm, ema=ema and ema.settings())
        self.parts = Parts(model=model, average=ema, facts=facts)
        self._ranks = Ranks(timeout_secs)
        meet(self._ranks, "making FolderSave", facts)
        self.background = Background("shardsmith-companion") if async_mode == "async" else None
        # Who writes what: agreed at the first save, and used again by later ones.
        self._share = Share(self._ranks.rank)
        self._buffer = StagingBuffer() if self.background else None
        self._in_flight = SavesInFlight(self.background, self._announce_save)
        self._loaded_step: int | None = None

    def resume(self) -> int | None:
        """Return the step of the folder that ``load`` was given, or None. No communication."""
        return self._loaded_step

    def on_step_end(self, step: int) -> None:
        """Announce a save that has ended. All ranks; communicates after the first step, if it is to prewarm."""
        self._in_flight.announce_ended()
        if not self._is_warm:
            self._prewarm(step)

    def report_background(self) -> None:
        """Announce the save in flight, or raise what failed in it, if it has ended."""
        self._in_flight.raise_ended()

    def wait(self) -> None:
        """Wait for the save in flight: announce it, or raise what failed in it. All ranks; no communication."""
        self._in_flight.wait()

    def close(self) -> None:
        """Wait for the save in flight; raise what failed in it."""
        try:
            self.wait()
        finally:
            if self.background:
                self.background.close()
            self._buffer = None
            release_pinned()

    @checked
    def before_save(self, folder: AsPath) -> None:
        """Wait for the save in flight and remove the manifest from a folder that the trainer is about to write.

        All ranks; communicates. Not calling it is safe, but a trainer that writes over an old folder of the same name
        and is killed halfway then leaves one that is marked complete until somebody compares the hashes.

        Raises:
            WriteError: our old directory in it cannot be removed.
        """
        self.wait()
        self._ranks.lead(f"preparing {folder.name}", lambda: self._withdraw(folder))

    @checked
    def save(self, step: StepNumber, folder: AsPath) -> None:
        """Add our directory to a folder that the trainer has just written. All ranks; communicates.

        On return the live state may change again.

        Raises:
            CheckpointNotFoundError, as RankFailedError with several ranks: there is no such folder.
            RankFailedError: on all ranks, if any failed. Our directory is not there, and the folder is as it was. What
                fails in the background is raised by ``wait``, or by ``Hooks`` on all ranks after the same step.
        """
        # First, as an old manifest of ours in it would speak for what the trainer has just written.
        self.before_save(folder)
        self._is_warm = True
        watch = Stopwatch()
        job = SaveInProgress(companion_of(folder), self._ranks, self._share)
        with self._ema.staging() if self._ema else contextlib.nullcontext(), self._same_time(folder):
            live = LiveModel(
                digest_live(self._ranks, f"taking digests for {folder.name}", lambda: self._main(folder)),
                tied_weights(self._model),
            )
            job.begin(lambda: self._collect(step), buffer=self._buffer)
        distance = self._ema.distance() if self._ema and self.is_heard else None
        self._in_flight.start(step, partial(self._finish, job, folder, step, live, watch, distance))
        if self.background:
            watch.released()

    @checked
    def has(self, folder: AsPath) -> bool:
        """Return whether our directory is in a folder, the same on all ranks. All ranks; waits for a save in flight."""
        self.wait()
        return self._ranks.lead(f"looking into {folder.name}", lambda: is_complete(folder))

    @checked
    def load(self, folder: AsPath, *, prove: bool = True, on_missing: OnMissing = "raise") -> int:
        """Verify the folder that the trainer has loaded, load the average, return the step. All ranks; communicates.

        It may have been saved by another number of ranks.

        Args:
            folder: The trainer's folder.
            prove: Compare the digest of each live tensor with the one that was recorded at the save.
            on_missing: What to do if the run that saved it had no average: ``"start"`` leaves ours as it is.

        Raises:
            CheckpointNotFoundError: our directory is not there, or holds no average.
            CorruptCheckpointError: our files have changed since they were written.
            MismatchError: the live model is not the one that was saved, or no such average. Nothing of ours was loaded.
            UsageError: the average there has another decay than ours. Nothing was loaded.
        """
        watch = Stopwatch()
        if not self.has(folder):
            raise CheckpointNotFoundError(folder, f"has no complete {COMPANION}/ directory. {_START}")
        self._refuse_damage(folder)
        if prove:
            self._verify(folder)
        if self._ema is not None:
            self._load_average(companion_of(folder), on_missing)
        self._loaded_step = step = read_folder_record(folder).step
        self.emit(event_of("resume", step, folder, watch, self._ranks.size))
        return step

    def _prewarm(self, step: int) -> None:
        """Make what the first save would make, and later ones use again. All ranks; communicates."""
        self._is_warm = True
        assert self._buffer is not None
        with self._ema.staging() if self._ema else contextlib.nullcontext():
            rehearsal = Rehearsal(Path(step_name(step)), self._ranks, self._share)
            rehearsal.prepare(lambda: self._collect(step), self._buffer)

    def _withdraw(self, folder: Path) -> None:
        if os.path.lexists(folder) and (reason := why_unreadable(folder)):
            log.warning("%s %s; it was set aside as %s, so that it can be saved", folder, reason, set_aside(folder))
        if not folder.is_dir():
            return
        with self._same_time(folder):
            sweep(folder)
            disown(folder / SHARDED_MODEL)
            if companion_of(folder).exists() and not remove(companion_of(folder)):
                raise UsageError(f"{companion_of(folder)} is being read, and about to be written over")

    def _collect(self, step: int) -> Contents:
        state: dict[str, Any] = {"train_state": {"step": torch.tensor(step, device="cpu")}}
        if self._ema is None:
            return Contents(step=step, state_dict=state)
        state["ema_state"] = self._ema.state_dict()
        state["ema_model"] = state["ema_state"].pop("model")
        return Contents(step=step, state_dict=state, ema=self._ema.facts(), tied=tied_weights(self._model))

    def _main(self, folder: Path) -> dict[str, Tensor]:
        """The live weights and persistent buffers, tied ones once. Raises CheckpointNotFoundError without a folder."""
        if not folder.is_dir():
            raise CheckpointNotFoundError(folder, "is not where the trainer was expected to write")
        state, aliases = get_model_state_dict(self._model), tied_weights(self._model)
        return {name: value for name, value in state.items() if isinstance(value, Tensor) and name not in aliases}

    def _finish(
        self,
        job: SaveInProgress,
        folder: Path,
        step: int,
        live: LiveModel,
        watch: Stopwatch,
        distance: float | None,
    ) -> Path | None:
        """Write ours, read theirs, commit. In the background thread, if there is one. None if the folder is gone."""
        try:
            with self._same_time(folder):
                job.write()
                record = record_folder(self._ranks, folder, step, live)
                job.commit({FOLDER_FILE: record.to_json()})
        except BaseException as error:
            if not _is_being_deleted(folder):
                log.exception("%s was not completed", folder)  # loud even if nobody comes to ask for the result
                self.emit(event_of("save", step, folder, watch, self._ranks.size, error))
                raise
        if not is_deserted(folder):
            if self._ranks.is_leader:
                with logged(f"measuring {companion_of(folder)}"):
                    place, size = companion_of(folder), self._ranks.size
                    event = event_of("save", step, place, watch, size, ema_distance=distance)
                    log.info("completed %s", event.line)
                    self.emit(event)
            return folder
        log.info("%s was deleted before its average was written", folder)  # the trainer deletes what it likes
        if self._ranks.is_leader:
            shutil.rmtree(folder, ignore_errors=True)  # it could not while we were writing
        return None

    def _refuse_damage(self, folder: Path) -> None:
        part, parts = self._ranks.rank, self._ranks.size

        def judge(found: list[list[str]]) -> None:
            if damage := [*chain(*found)]:
                lines = "\n  ".join(damage)
                raise CorruptCheckpointError(companion_of(folder), f"is damaged\n  {lines}\nTake another checkpoint.")

        look = f"verifying {companion_of(folder)}"
        self._ranks.agree(look, lambda: find_damage(companion_of(folder), part=part, parts=parts), judge)

    def _verify(self, folder: Path) -> None:
        """Raise MismatchError unless the live model is what the trainer saved, if need be after loading the rest."""
        recorded, aliases = read_folder_record(folder).tensors, tied_weights(self._model)
        problems = self._differences(folder, recorded, aliases)
        others = [name for name in problems if problems[name] == OTHER_VALUES]
        # Only if nothing differs but values: other names or shapes mean another model.
        if others and len(others) == len(problems) and reload(self._model, folder, others):
            problems = self._differences(folder, recorded, aliases)
            log.warning("the trainer did not load %s from %s; we did", ", ".join(others), folder)
        if problems:
            summary = f"{len(problems)} of {len(recorded)} tensors of the live model are not what was saved"
            lines = [f"{name}: {problem}" for name, problem in problems.items()]
            advice = "The average was not loaded. Either the trainer did not load this folder, or not all of it."
            raise MismatchError(folder, summary, lines, advice)

    def _differences(
        self, folder: Path, recorded: Mapping[str, TensorRecord], aliases: Mapping[str, str]
    ) -> dict[str, str]:
        live = digest_live(self._ranks, f"verifying the load of {folder.name}", lambda: self._main(folder))
        return compare_digests(live, recorded, aliases)

    def _load_average(self, directory: Path, on_missing: OnMissing) -> None:
        assert self._ema is not None
        metadata = read_metadata(directory)
        saved = metadata.ema
        if saved is None and on_missing == "start":
            log.warning("%s holds no average: it starts from the weights as they are", directory)
            return
        if saved is None:
            raise CheckpointNotFoundError(directory, f"holds no average: the run that wrote it had none. {_START}")
        refuse_other_decay(directory, saved.get("decay", self._ema.decay), self._ema)
        contents = self._collect(0)
        state = contents.state_dict
        refuse_left_behind(
            self._ranks, directory, lambda: LeftBehind.of(state, contents.tied, metadata.tensors, beside=())
        )
        fill(state, directory, self._ranks)
        self._ema.load_state_dict({**state["ema_state"], "model": state["ema_model"]})
        log.info("the average goes on from %s", directory)

    @contextlib.contextmanager
    def _same_time(self, folder: Path) -> Iterator[None]:
        """Afterwards the folder's modification time is what it was. On rank 0, which alone makes and renames there."""
        before = folder.stat() if self._ranks.is_leader and folder.is_dir() else None
        try:
            yield
        finally:
            if before is not None:
                with contextlib.suppress(OSError):  # the folder is gone
                    os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))


def _is_being_deleted(folder: Path) -> bool:
    """Whether a trainer deletes a folder, or has: as long as there is less and less in it, wait for what is left."""
    before = None
    while not is_deserted(folder):
        with contextlib.suppress(FileNotFoundError):
            found = sum(1 for _ in folder.rglob("*"))
            # It does not shrink: nobody deletes it.
            if before is not None and found >= before:
                return False
            before = found
        time.sleep(_DELETION_SECS)
    return True
