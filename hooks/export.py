"""``HFExport``: complete Hugging Face directories at selected steps, while the run trains."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, Unpack

from torch import nn

from shardsmith.checking.arguments import checked
from shardsmith.checking.types import Dtype, Place, StepNumber
from shardsmith.conversion.model_directory import find_model
from shardsmith.errors import UsageError
from shardsmith.export.adapters import ADAPTER_WEIGHTS
from shardsmith.export.file_writer import choose_writer
from shardsmith.export.joint_export import Check, JointExport
from shardsmith.ground.layout import step_name
from shardsmith.ground.logs import Stopwatch
from shardsmith.ground.meeting import made_together, meet
from shardsmith.ground.ranks import Ranks
from shardsmith.ground.remote_path import RemotePath, as_path
from shardsmith.ground.sizes import parse_size
from shardsmith.manifest.retention import Retention

from .adapters import view_of
from .answers import Answers
from .background import attempted, logged
from .checkpoint_source import CheckpointSource, check_source
from .ema import EMA
from .events import event_of
from .export_folder import ExportFolder, prepare_folder
from .export_results import ExportResults
from .held import HeldView
from .hook import Hook
from .in_flight import SLOTS, InFlight
from .live_directory import LiveDirectory, ModelFiles
from .live_source import Begin, LiveSource
from .live_state import LiveState
from .options import ExportFiles, ExportOptions, ExportVerification, ExportWeights, ExportWriting, merge
from .overlap import OpenCopy
from .push import Pushes
from .schedule import Schedule
from .view import View
from .wiring import Parts, alike

log = logging.getLogger(__name__)


class HFExport(Hook):
    """Write ``directory/step-<n>`` as a complete Hugging Face directory, straight from the sharded live weights.

        HFExport("run/hf", model=model, ema=ema, base_model="assets/base", when=every(1000) | last())

    The training waits while each rank copies its own shards, cast, into CPU memory; of what a ``ShardedSave`` before
    this hook has copied at the same step, that copy is read instead. A background thread of each rank
    writes them to their final places in the final files and reads them back; then rank 0 adds the other files and
    renames the directory. Make it on all ranks at the same point, after ``fully_shard`` / FSDP / DDP.

    Attributes:
        directory: Where the step directories are; absolute, so that a later ``os.chdir`` changes nothing.
        base_model: The directory of the base model; None without one.
    """

    @made_together
    @checked
    def __init__(
        self,
        directory: Place,
        *,
        model: nn.Module,
        when: Schedule,
        ema: EMA | None = None,
        models: Literal["main", "ema", "both", "all"] = "all",
        dtype: Dtype = "bfloat16",
        keep: Retention | None = None,
        files: ExportFiles | None = None,
        weights: ExportWeights | None = None,
        writing: ExportWriting | None = None,
        verification: ExportVerification | None = None,
        **options: Unpack[ExportOptions],
    ) -> None:
        """Check that the directory can be written to, and that model and base model fit each other.

        Args:
            directory: Made if missing; on a file system that all ranks share, and where no trainer looks for its own.
                Or a place in an object store, such as ``s3://bucket/run/hf``.
            model: The model that trains, wrapped and sharded.
            when: At which steps to export; independent of any checkpoint.
            ema: The average to export, too.
            models: What to export: "all" takes what there is, "both" needs ema=.
            dtype: Of floating-point tensors, such as ``"bfloat16"``; ``"original"`` keeps each tensor's. What the
                model's class keeps in float32 when it is loaded in such a dtype is not rounded, as the bias of some
                routers of experts. Or by pattern of the names in the files, of which the first that matches decides:
                ``{"*norm*": "float32", "*": "bfloat16"}``; only ``"*"`` has that exception. A tensor that matches none
                keeps its own.
            keep: Which exports to retain after a new one; None keeps all. The newest is always kept.
            files: The files beside the weights: base model, processor and more.
            weights: Where the weights come from, and how their files name and divide them.
            writing: How to write in the background; what to do if that is late or fails; where on the
                Hugging Face Hub it goes then.
            verification: How to verify an export before it is published.
            **options: Fields of these four objects as keywords of their own: ``base_model="assets/base"`` stands for
                ``files=ExportFiles(base_model="assets/base")``.

        Raises:
            UsageError: the arguments do not fit each other, or not the model; or a subject is given as an object and by
                keywords.
            RankFailedError, WriteError, CheckpointError: the directory cannot be written to, or the base does not fit.
        """
        files = merge("HFExport", "files", ExportFiles, files, options)
        weights = merge("HFExport", "weights", ExportWeights, weights, options)
        writing = merge("HFExport", "writing", ExportWriting, writing, options)
        verification = merge("HFExport", "verification", ExportVerification, verification, options)
        if models in ("ema", "both") and ema is None:
            raise UsageError(f'HFExport(models="{models}") needs ema=: attach EMA(model) and pass it')
        self.directory = as_path(directory).absolute()
        # A store does not write in the middle of a file: there each is written by one rank, whatever was asked for.
        write_mode = "files" if isinstance(self.directory, RemotePath) else writing.write_mode
        if writing.max_host_memory is not None and write_mode == "files":
            raise UsageError(
                "HFExport(max_host_memory=...) bounds copies of which each rank writes its own slices; with "
                'write_mode="files", and in an object store, one rank writes each file from the copies of all. Leave '
                'it out, or export saved steps, which copies nothing: source="checkpoint"'
            )
        if writing.on_push_error == "raise" and writing.on_error == "warn":
            raise UsageError('HFExport(on_push_error="raise") needs on_error="raise", too')
        self._pushes = Pushes(writing, self.directory, lambda event: self.emit(event))
        self.when = when
        self.keep = keep
        self._writing = writing
        chosen = models if models != "all" else "both" if ema is not None else "main"
        facts = alike(
            directory=self.directory,
            when=when,
            keep=keep,
            models=chosen,
            source=weights.source,
            dtype=dtype,
            write_mode=write_mode,
            staging=writing.staging,
            ema=ema and ema.settings(),
        )
        self.parts = Parts(model=model, average=ema, directory=self.directory, facts=facts)
        self._ranks = Ranks(writing.timeout_secs)
        meet(self._ranks, "making HFExport", facts)
        self._writer_ranks = Ranks(writing.timeout_secs)  # for the thread that writes
        view = self._read_model(model, ema, dtype, files, weights)
        asked = verification.verify_inputs, verification.verify_with
        self._answers = Answers(model, ema, *asked) if verification.verify == "load" else None
        self._copy = OpenCopy()
        if writing.staging == "overlap":
            self._copy.guard_all(ema)
        live, saved = self._make_sources(weights, write_mode, compare_replicas=verification.compare_replicas)
        self._exported_step: int | None = None
        self._has_said_copied = False
        self._has_said_of_tokens = ""
        self._prepare(lambda: LiveDirectory.choose(chosen, weights.ema_as, view, self._state.stem))
        if weights.stages:
            self._state.unite(self._ranks)
        self._choose_source(weights.source, live, saved)

    def _read_model(
        self, model: nn.Module, ema: EMA | None, dtype: Dtype, files: ExportFiles, weights: ExportWeights
    ) -> View | None:
        """Find the base model, and how the files name the model's tensors; the view of it. Communicates.

        Raises:
            UsageError, RankFailedError: there is no base model, or the options do not fit the model.
        """
        self.base_model: Path | None = None
        if files.base_model is not None:
            self._ranks.gather("finding the base model", lambda: self._find_base(str(files.base_model)))
        view = view_of(model, weights.adapters, held=weights.names == "auto")
        if files.base_model is not None and view is not None and view.stem == ADAPTER_WEIGHTS:
            raise UsageError(
                "an adapter has no base model beside it: pass processor= for the tokenizer, not base_model="
            )
        is_adapter = view is not None and not isinstance(view, HeldView)
        check_source(weights.source, weights.checkpoints, is_adapter=is_adapter)
        self._state = LiveState(
            model,
            ema,
            ModelFiles.of(files, self.base_model),
            dtype=dtype,
            max_shard_size=weights.max_shard_size,
            names=weights.names,
            view=view,
        )
        return view

    def _make_sources(
        self, weights: ExportWeights, write_mode: str, *, compare_replicas: Literal["first", "never"] | int
    ) -> tuple[LiveSource, CheckpointSource | None]:
        """Make what exports read: the live weights, and the run's checkpoints if there are some. No communication."""
        writer, both = choose_writer(write_mode, self._ranks), (self._ranks, self._writer_ranks)
        live = LiveSource(self._state, *both, writer, copy=self._copy, compare_replicas=compare_replicas)
        if weights.checkpoints is None:
            return live, None
        whole_files = write_mode == "files"
        return live, CheckpointSource(weights.checkpoints, self._state, *both, when=self.when, whole_files=whole_files)

    def _prepare(self, choose: Callable[[], Sequence[LiveDirectory]]) -> None:
        """Make sure that the folder can be written to, and read the base model, then choose directories. Communicates.

        Raises:
            RankFailedError, WriteError, CheckpointError: the folder cannot be written to, or the base does not fit.
        """
        prepare = partial(prepare_folder, self.directory, self.base_model) if self._ranks.is_leader else list[int]
        broken_off = self._ranks.agree(f"preparing {self.directory}", prepare, lambda of_ranks: of_ranks[0])
        self._ranks.gather("reading the base model", self._state.read_files)
        directories = choose()  # their names depend on the base model
        self._folder = ExportFolder(self.directory, directories, self.keep, broken_off)
        bound = self._writing.max_host_memory
        self._in_flight = InFlight(len(directories), None if bound is None else parse_size(bound))
        self._results = ExportResults(self._in_flight, self._pushes, self._writing)
        if self._writing.on_error == "raise":
            self.background = self._in_flight.background

    def _find_base(self, name: str) -> None:
        self.base_model = find_model(name, fetch=False)

    def on_train_begin(self, step: int) -> None:
        """Make the export of the resumed step, if it was due and the former run died before it was made.

        All ranks; communicates. Earlier steps are not made up for, since their weights are gone: the log names them.
        """
        self._ranks.lead("setting aside what is half deleted", lambda: self._folder.set_aside_unfinished(step))
        if self._ranks.is_leader:
            self._results.resume_pushes(step)
            self._folder.note_policy()
        # Not earlier than here: now the live weights are those of the resumed step.
        if self.when.due(step) and self._ranks.lead(
            f"looking for the export of step {step}", lambda: self._folder.missing(step)
        ):
            self._export(step, "wait")

    def on_step_end(self, step: int) -> None:
        """Export if it is time, then announce exports that have ended. All ranks; communicates when it exports."""
        due, error = attempted(lambda: self.when.due(step))
        if due or error:
            self._export(step, self._writing.when_busy, error)
        else:
            self._in_flight.collect(self._in_flight.ended())
        self._results.announce()
        if self._in_flight.background.tell is None:
            self._results.raise_first()  # without Hooks no other rank is told

    def on_occasion(self, step: int) -> None:
        """Export the step, if that was not done. All ranks; communicates."""
        if step != self._exported_step:
            self._export(step, self._writing.when_busy)

    def report_background(self) -> None:
        """Announce exports that have ended; raise what failed in one."""
        self._copy.settle()
        self._in_flight.collect(self._in_flight.ended())
        self._results.announce()
        self._results.raise_first()

    def on_train_end(self, step: int) -> None:
        """Export the last step if that is wanted and was not done. All ranks; communicates when it exports."""
        if self.when.due(step, last=True) and step != self._exported_step:
            self._export(step, "wait")  # it is the result of the run, and there is no training left to hold up

    @property
    def in_flight(self) -> int:
        """Exports that are staged and not yet written, on this rank: 0, 1 or 2. No communication."""
        return self._in_flight.started - self._in_flight.ended()

    def wait(self) -> None:
        """Wait for the exports in flight; raise what failed in them. All ranks."""
        self._copy.settle()
        self._in_flight.collect(self._in_flight.started)
        self._results.announce()
        self._results.raise_first()

    def close(self) -> None:
        """Wait for the exports in flight and for pushes to the Hub; raise what failed in them."""
        try:
            self.wait()
            if self._pushes.wait():  # what was spared for a push may go now; on rank 0 alone
                self._folder.remove_old(self)
            self._results.raise_first()
        finally:
            self._pushes.close()
            self._copy.close()
            self._in_flight.close()

    @checked
    def export(self, step: StepNumber) -> None:
        """Export now, as ``step-<step>``. All ranks; communicates. On return the weights may change.

        Raises:
            RankFailedError: on all ranks, if any could not stage its part. Nothing was published. What fails in the
                background is raised by ``wait`` or ``close``, or by ``Hooks`` on all ranks after the same step.
            UsageError: two exports are in flight, and ``when_busy`` is ``"raise"``.
        """
        self._export(step, self._writing.when_busy)

    def _export(self, step: int, when_busy: Literal["wait", "skip", "raise"], error: Exception | None = None) -> None:
        """``error``: of this rank, perhaps of it alone. Then all ranks raise instead of exporting."""
        self._in_flight.background.refuse_closed()
        self._copy.settle()  # what the last export still copies beside the training
        wanted = self._make_room(step, when_busy, error)
        if not wanted:
            return
        watch = Stopwatch()
        try:
            targets = [self._folder.targets(step)[i] for i in wanted]
            checks = [self._ask(*target) for target in targets]
            buffers = [self._in_flight.next_buffers[i] for i in wanted]
            begin = self._source.begin(step, targets, buffers, self.step_copies)
        except BaseException as failure:
            self.emit(event_of("export", step, self.directory / step_name(step), watch, self._ranks.size, failure))
            raise
        self._exported_step = step
        watch.released()
        self._in_flight.start(step, lambda: self._finish(step, begin, checks, watch))
        self._source.feed()
        watch.released()  # once more: the training waits, too, for what is fed

    def _ask(self, directory: LiveDirectory, path: Path) -> Check | None:
        """What a directory of the weights as they are now must pass."""
        checks: list[Check | None] = [None]
        if (answers := self._answers) is not None:
            phase = f"asking the live model for {path.name}"
            self._ranks.gather(phase, lambda: checks.append(answers.check_for(directory)))
        return checks[-1]

    def _make_room(self, step: int, when_busy: Literal["wait", "skip", "raise"], error: Exception | None) -> list[int]:
        """Which of the directories to export; if any, there is a free slot.

        Rank 0 decides; the others catch up with what has ended there. Nothing is raised here of what has failed: then
        a rank that has raised it earlier would be alone.
        """
        in_flight = self._in_flight

        def look() -> tuple[int, list[int]]:
            if error is not None:
                raise error
            return (in_flight.ended(), self._folder.missing(step)) if self._ranks.is_leader else (0, [])

        ended, wanted = self._ranks.agree("looking for a free slot", look, lambda of_ranks: of_ranks[0])
        if len(wanted) < len(self._folder.directories):
            log.warning("step %s was exported before the run was resumed; what is there is kept", step)
        if not wanted:
            return []
        busy = in_flight.started - ended >= SLOTS
        if busy and when_busy == "wait":
            # One more must end, and all ranks wait for the same number.
            ended += 1
        in_flight.take_back(ended)
        if busy and when_busy == "raise":
            raise UsageError(f"step {step} cannot be exported: two exports are in flight. Export less often, or wait")
        if busy and when_busy == "skip":
            log.warning("step %s was not exported: two exports are in flight", step)
            return []
        return wanted

    def _finish(self, step: int, begin: Begin, checks: list[Check | None], watch: Stopwatch) -> list[Path]:
        """Write and commit. In the background thread."""
        try:
            with contextlib.ExitStack() as unfinished:
                jobs = begin(unfinished)
                for job, check in zip(jobs, checks, strict=True):
                    job.check = check
                    unfinished.enter_context(job)
                    job.write()
                # All directories are written before one is published: an error leaves none of them.
                paths = [job.commit() for job in jobs]
        except BaseException as error:
            log.exception("step %s was not exported", step)  # loud even if nobody comes to ask for the result
            self.emit(event_of("export", step, self.directory / step_name(step), watch, self._ranks.size, error))
            raise
        if self._writer_ranks.is_leader:
            with logged(f"measuring {paths[0]}"):
                self._say(step, jobs, watch)
            self._results.push(step, paths)
            self._folder.remove_old(self, spare=self._pushes.pending)
        return paths

    def _say(self, step: int, jobs: Sequence[JointExport], watch: Stopwatch) -> None:
        """What was exported; once also of which tensors there is no average. Rank 0, in the background."""
        for job in jobs:
            event = event_of("export", step, job.plan.output, watch, self._ranks.size)
            log.info("exported %s; %s", event.line, job.measure)
            if job.measure is not None and (said := job.measure.tokenizer) not in {"", self._has_said_of_tokens}:
                self._has_said_of_tokens = said
                log.warning("%s: %s", job.plan.output, said)
            self.emit(event)
        copied = [name for job in jobs for name in job.plan.not_averaged]
        if copied and not self._has_said_copied:
            self._has_said_copied = True
            more = f" and {len(copied) - 5} more" if len(copied) > 5 else ""
            advice = "EMA(buffers=True) averages buffers, too"
            log.info("not averaged, as in the main weights: %s%s (%s)", ", ".join(copied[:5]), more, advice)

    def _choose_source(self, source: str, live: LiveSource, saved: CheckpointSource | None) -> None:
        """All ranks; communicates."""
        self._source: LiveSource | CheckpointSource = live
        if saved is not None and (source == "checkpoint" or not live.is_possible(self._folder.directories)):
            self._source = saved
        if self._source is live:
            self._ranks.gather("looking at the base model", lambda: self._state.check(compare=self._ranks.is_leader))
