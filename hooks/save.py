"""``ShardedSave``: sharded checkpoints of a run that is training, and the way back."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TypeVar, Unpack

from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from shardsmith.checking.arguments import checked
from shardsmith.checking.types import Place, Scheduler, StepNumber
from shardsmith.errors import CheckpointNotFoundError, RankFailedError, UsageError
from shardsmith.ground.layout import step_name
from shardsmith.ground.logs import Stopwatch
from shardsmith.ground.meeting import made_together, meet
from shardsmith.ground.ranks import Ranks
from shardsmith.ground.remote_path import as_path
from shardsmith.ground.sizes import parse_size
from shardsmith.manifest import checkpoints
from shardsmith.manifest.retention import Retention
from shardsmith.run_state.alike import ReplicaCheck
from shardsmith.run_state.contents import Contents
from shardsmith.run_state.optimizers import check_optimizers
from shardsmith.run_state.rank_states import PerRank
from shardsmith.run_state.rehearsal import Rehearsal, refuse_without_copies
from shardsmith.run_state.resume_parts import OnMissing
from shardsmith.run_state.save import SaveInProgress
from shardsmith.run_state.share import Share
from shardsmith.run_state.train_state import TrainState, optimizer_list
from shardsmith.sharding.live_boxes import StagingBuffer
from shardsmith.tensors.device_copy import release_pinned

from .background import Background, SavesInFlight, attempted, logged
from .ema import EMA
from .events import event_of
from .hook import Hook
from .local_cache import LocalCache, room_in
from .options import SaveOptions, SaveWeights, SaveWriting, merge
from .overlap import OpenCopy
from .resumed import ResumedRun
from .save_weights import HuggingFaceWeights, refuse_together
from .schedule import Schedule
from .step_folder import StepFolder, prepare
from .wiring import Parts, alike

log = logging.getLogger(__name__)

Job = TypeVar("Job", bound=SaveInProgress)


class ShardedSave(Hook):
    """Save model, average, optimizer, scheduler, random number generators and more as one DCP directory a step.

        ShardedSave("run/checkpoints", model=model, optimizer=optimizer, ema=ema, when=every(500) | last())

    Each rank writes its own shards; nothing is gathered. A step's directory appears when all of it is on disk. Make it
    on all ranks at the same point, after ``fully_shard`` / FSDP / DDP: it communicates.

    Attributes:
        directory: Where the step directories are; absolute, so that a later ``os.chdir`` changes nothing.
    """

    @made_together
    @checked
    def __init__(
        self,
        directory: Place,
        *,
        model: nn.Module,
        when: Schedule,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        scheduler: Scheduler | None = None,
        ema: EMA | None = None,
        stateful: Mapping[str, Stateful | PerRank] | None = None,
        keep: Retention | None = None,
        on_missing: OnMissing = "raise",
        writing: SaveWriting | None = None,
        files: SaveWeights | None = None,
        **options: Unpack[SaveOptions],
    ) -> None:
        """Check that the directory can be written to and remove what dead attempts left there.

        Args:
            directory: Made if missing; on a file system that all ranks share, or in an object store:
                ``s3://bucket/run``, see docs/storage.md.
            model: The model that trains, wrapped and sharded.
            when: At which steps to save.
            optimizer: One, or all of the model's.
            scheduler: Of the learning rate; saved and resumed.
            ema: The average to save, too.
            stateful: More things to save, by top-level key; each has ``state_dict`` and ``load_state_dict``. Their
                states must be the same on all ranks; the state that each rank has for itself is passed as
                ``per_rank(loader)``.
            keep: Which committed steps to retain after a new one; None keeps all. The newest is always kept.
            on_missing: What a resume does with a part that the checkpoint does not have, such as an average in a run
                that had none: ``"raise"``, or ``"start"`` it anew.
            writing: How to write: in the background or not, in which layout, with which checks.
            files: In which files the weights are: those of DCP, or those of a Hugging Face directory.
            **options: Fields of ``writing`` and ``files`` as keywords of their own: ``async_mode="disabled"`` stands
                for ``writing=SaveWriting(async_mode="disabled")``.

        Raises:
            UsageError: a name in ``stateful`` is taken, the optimizer's parameters are not the model's,
                ``staging="overlap"`` without an optimizer, or that or ``prewarm`` without ``async_mode="async"``.
            RankFailedError, WriteError: the directory cannot be written to.
        """
        writing = merge("ShardedSave", "writing", SaveWriting, writing, options)
        files = merge("ShardedSave", "files", SaveWeights, files, options)
        self.directory = as_path(directory).absolute()
        refuse_together(files, writing, self.directory)
        refuse_without_copies("ShardedSave", prewarm=writing.prewarm, has_copies=writing.async_mode == "async")
        self.when = when
        self.keep = keep
        optimizers = optimizer_list(optimizer)
        facts = alike(
            directory=self.directory,
            when=when,
            keep=keep,
            async_mode=writing.async_mode,
            staging=writing.staging,
            prewarm=writing.prewarm,
            layout=writing.layout,
            weights=files.weights,
            ema=ema and ema.settings(),
            optimizer=sorted({type(one).__name__ for one in optimizers}),
            scheduler=scheduler and type(scheduler).__name__,
            stateful=sorted(stateful or {}),
            local_cache=writing.local_cache is not None,
        )
        beside = [thing.thing if isinstance(thing, PerRank) else thing for thing in (stateful or {}).values()]
        loads = [thing for thing in (model, *optimizers, scheduler, ema, *beside) if thing is not None]
        self.parts = Parts(model=model, average=ema, directory=self.directory, resumes=True, loads=loads, facts=facts)
        self._ranks = Ranks(writing.timeout_secs)
        meet(self._ranks, "making ShardedSave", facts)
        check_optimizers("ShardedSave", model, optimizers, scheduler)
        self._state = TrainState(
            model,
            optimizer=optimizers,
            scheduler=scheduler,
            ema=ema,
            stateful=stateful,
            nested=writing.layout == "nested",
            rank=self._ranks.rank,
            world_size=self._ranks.size,
        )
        self._ema = ema
        self._on_saved = writing.on_saved
        self._weights: HuggingFaceWeights | None = None
        if files.weights == "huggingface":
            self._weights = HuggingFaceWeights(model, ema, files, self.directory, self._ranks)
        self._copy = OpenCopy()
        if writing.staging == "overlap":
            self._copy.guard(optimizers, ema, in_background=writing.async_mode == "async")
        self._steps = StepFolder(self.directory, keep, latest_link=writing.latest_link)
        self._replicas = ReplicaCheck(self._ranks, writing.compare_replicas)
        self.background = Background("shardsmith-save") if writing.async_mode == "async" else None
        self._share = Share(self._ranks.rank)
        most_bytes = parse_size(writing.max_host_memory) if writing.max_host_memory is not None else None
        self._buffer = StagingBuffer(most_bytes) if self.background else None
        # FSDP1 makes new tensors for each state dict: no export has the same, and they are not to be kept for one.
        self._is_shared = not any(isinstance(part, FullyShardedDataParallel) for part in model.modules())
        self._is_warm = not writing.prewarm
        self._in_flight = SavesInFlight(self.background, self._announce_save)
        self._saved_step: int | None = None
        prepared = partial(prepare, self.directory, self._ranks.is_leader, may_be_away=bool(writing.local_cache))
        self._ranks.gather(f"preparing {self.directory}", prepared)
        self.local_cache = LocalCache.of(self, writing, keep)
        self._place = self.directory if self.local_cache is None else self.local_cache.folder.path
        self._resumed = ResumedRun(self.directory, self._state, self._ranks, self._steps, self.local_cache, on_missing)

    def on_train_begin(self, step: int) -> None:  # noqa: ARG002
        """Write down what is kept, on rank 0, unless the store may be away. No communication."""
        if self._ranks.is_leader and self.local_cache is None:
            self._steps.note_policy()

    def on_step_end(self, step: int) -> None:
        """Announce a save that has ended, and save if it is time. All ranks; communicates when it saves."""
        self._in_flight.announce_ended()
        self._resumed.refuse_spoiled()  # tensors may hold what was damaged
        due, error = attempted(lambda: self.when.due(step))
        if due or error:
            self._save(step, error)
        elif not self._is_warm:
            self._prewarm(step)

    def on_occasion(self, step: int) -> None:
        """Save the step, if that was not done. All ranks; communicates."""
        if step != self._saved_step:
            self._save(step, None)

    def on_stop(self, step: int) -> None:
        """Save the step, if that was not done. All ranks; communicates."""
        if step != self._saved_step:
            self.save(step)

    def on_saved(self, step: int, path: Path) -> None:
        """Pass a save of this hook on to its own ``on_saved``. No communication."""
        if self._on_saved is not None and path.parent == self._place:
            self._on_saved(step, path)

    def report_background(self) -> None:
        """Announce the save in flight, or raise what failed in it, if it has ended."""
        self._copy.settle()
        self._in_flight.raise_ended()

    def on_train_end(self, step: int) -> None:
        """Save the last step if that is wanted and was not done. All ranks; communicates when it saves."""
        if self.when.due(step, last=True) and step != self._saved_step:
            self.save(step)

    def close(self) -> None:
        """Wait for the save in flight; raise what failed in it."""
        try:
            self._report()
            if self.local_cache is not None:
                self.local_cache.close()
        finally:
            self._copy.close()
            if self.background:
                self.background.close()
            self._buffer = None
            release_pinned()

    @checked
    def save(self, step: StepNumber) -> None:
        """Save now, as ``step-<step>``. All ranks; communicates.

        A save that is still in flight is waited for first. On return the live state may change again.

        Raises:
            RankFailedError: on all ranks, if any failed. Nothing was published, and a later save starts afresh. With
                one rank, the original error. What fails in the background is raised later, by this, by ``close``, or
                by ``Hooks`` on all ranks after the same step.
        """
        self._save(step, None)

    def _save(self, step: int, error: Exception | None) -> None:
        """``error``: of this rank, perhaps of it alone. Then all ranks raise instead of saving."""
        self._resumed.refuse_spoiled()
        watch = Stopwatch()
        self._is_warm = True
        error = attempted(self._report)[1] or error  # of the save in flight: all ranks are told of it

        @functools.cache  # what is compared is what is saved
        def collect() -> Contents:
            if error is not None:
                raise error
            return self._collect(step, job.target)

        job = self._job(SaveInProgress, step)  # waits for room in a cache
        try:
            self._stage(job, collect, error)
        except BaseException as failure:
            self.emit(event_of("save", step, job.target, watch, self._ranks.size, failure))
            raise
        self._saved_step = step
        distance = self._ema.distance() if self._ema and self.is_heard else None
        self._in_flight.start(step, partial(self._finish, step, job, watch, distance))
        if self.background:
            job.feed()
            watch.released()

    def _prewarm(self, step: int) -> None:
        """Make what the first save would make, and later ones use again. All ranks; communicates."""
        self._is_warm = True
        rehearsal = self._job(Rehearsal, step)
        collect = partial(self._collect, step, rehearsal.target)
        with self._state.ema.staging() if self._state.ema else contextlib.nullcontext():
            assert self._buffer is not None
            rehearsal.prepare(collect, self._buffer, self._state.shared_keys)

    def _job(self, kind: type[Job], step: int) -> Job:
        return kind(self._place / step_name(step), self._ranks, self._share, room_in(self.local_cache))

    def _collect(self, step: int, target: Path) -> Contents:
        contents = self._state.collect(step)
        return contents if self._weights is None else self._weights.added_to(contents, target)

    def _stage(self, job: SaveInProgress, collect: Callable[[], Contents], error: Exception | None) -> None:
        """Collect the state, agree on who writes what, and copy it if it is written in the background."""
        with self._state.ema.staging() if self._state.ema else contextlib.nullcontext():
            try:
                phase = f"collecting {job.target.name}"
                self._replicas.look(phase, lambda: self._state.replicated(collect().state_dict))
                later = self._state.changed_by_steps() if self._copy.is_wanted else None
                shared = self.step_copies if self._is_shared else None
                job.begin(collect, self._state.shared_keys, self._buffer, later, shared)
            except RankFailedError:
                if error is not None:
                    raise error from None
                raise
            if self._buffer:
                self._copy.begin(job)

    @checked
    def saving(self, step: StepNumber) -> Future[Path]:
        """Return the save of a step, in flight or done. No communication; waits for copies that are being made.

        Raises:
            UsageError: the step was not saved, or not yet.
        """
        self._copy.settle()
        if (save := self._in_flight.of_step(step)) is not None:
            return save
        path = self.directory / step_name(step)
        if step not in checkpoints.committed_steps(self.directory):
            raise UsageError(f"{path} is not there and not being saved; ShardedSave saves at {self.when}")
        done: Future[Path] = Future()
        done.set_result(path)
        return done

    @checked
    def resume(
        self,
        *,
        step: StepNumber | None = None,
        parts: Sequence[str] | None = None,
        directory: Place | None = None,
        on_missing: OnMissing | None = None,
    ) -> int | None:
        """Load the newest checkpoint that is sound; return its step, or None without any. All ranks; communicates.

        Its files are compared with their hashes while they are loaded. One that is damaged is set aside, and said so in
        the log, and the one before it is loaded over what is in memory. It may have been saved by another number of
        ranks.

        Args:
            step: Load this one, and no other. Later ones in the directory of this hook are set aside.
            parts: What to load: ``"model"``, ``"ema"``, ``"optimizer"``, ``"scheduler"``, ``"rng"`` and the names in
                ``stateful``. The others stay as they are. None loads all.
            directory: Where to look, if not where this hook saves. Nothing is set aside there.
            on_missing: As in the constructor.

        Raises:
            CheckpointNotFoundError: the step that was asked for is not there.
            IncompleteCheckpointError: there are checkpoints, but none is sound. Tensors of the run may hold what was
                damaged; so this hook takes no step and saves nothing until something sound has been loaded.
            MismatchError: it does not hold what model, optimizer and so on need. Nothing was loaded.
            UsageError: this run has no such part.
        """
        self._report()  # a save in flight is the newest
        place = self.directory if directory is None else as_path(directory).absolute()
        found = self._resumed.load_newest(step, parts, place, on_missing)
        if found is None and directory is not None:
            raise CheckpointNotFoundError(place, "holds no checkpoint; name the directory that has the step-<n>")
        if found is not None and place == self.directory:
            self._saved_step = found
        return found

    @checked
    def load(
        self, checkpoint: Place, *, parts: Sequence[str] | None = None, on_missing: OnMissing | None = None
    ) -> None:
        """Load everything, or some parts, from one checkpoint directory. All ranks; communicates.

        It may be one of ``ShardedCheckpointManager``, also in files of single ranks. Random number generators are
        restored on the ranks that the saving run had, too.

        Args:
            checkpoint: A committed ``step-<n>``.
            parts: As in ``resume``.
            on_missing: As in the constructor.

        Raises:
            UsageError: the average in it has another decay than ours. Nothing was loaded.
            MismatchError: it does not hold what is needed. Nothing was loaded.
        """
        self._copy.settle()
        self._resumed.load(as_path(checkpoint), parts, on_missing)

    def _finish(self, step: int, job: SaveInProgress, watch: Stopwatch, distance: float | None) -> Path:
        """Write, commit, then retention. In the background thread, if there is one."""
        try:
            job.write()
            path = job.commit()
        except BaseException as error:
            log.exception("%s was not saved", job.target)  # loud even if nobody comes to ask for the result
            self.emit(event_of("save", step, job.target, watch, self._ranks.size, error))
            raise
        if self._ranks.is_leader:
            with logged(f"measuring {path}"):
                event = event_of("save", step, path, watch, self._ranks.size, ema_distance=distance)
                log.info("saved %s", event.line)
                self.emit(event)
        if self.local_cache is not None:
            self.local_cache.add(step)
        elif self._ranks.is_leader:
            self._steps.follow(self, step)
        return path

    def _report(self) -> None:
        """Wait for the save in flight, if there is one: announce it, or raise what failed in it."""
        self._copy.settle()
        self._in_flight.wait()
