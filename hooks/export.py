"""``HFExport``: complete Hugging Face directories at selected steps, while the run trains."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
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
from shardsmith.export.live import Check, JointExport
from shardsmith.ground.commit import check_writable, sweep
from shardsmith.ground.layout import PROVENANCE_FILE, step_name, unfinished_step
from shardsmith.ground.logs import Stopwatch
from shardsmith.ground.meeting import made_together, meet
from shardsmith.ground.ranks import Ranks
from shardsmith.ground.remote_path import RemotePath, as_path
from shardsmith.hf.hf_directory import protect
from shardsmith.manifest.checkpoints import refuse_within_step, set_aside_unfinished
from shardsmith.manifest.retention import Retention

from .adapters import view_of
from .answers import Answers
from .background import attempted, logged
from .checkpoint_source import CheckpointSource, check_source
from .ema import EMA
from .events import event_of
from .held import HeldView
from .hook import Hook
from .in_flight import SLOTS, InFlight, Running
from .live_directory import LiveDirectory, ModelFiles, is_sound
from .live_source import Begin, LiveSource
from .live_state import LiveState
from .options import ExportFiles, ExportOptions, ExportPush, ExportVerification, ExportWeights, ExportWriting, merge
from .overlap import OpenCopy
from .push import Pushes
from .schedule import Schedule
from .step_folder import StepFolder
from .wiring import Parts, alike

log = logging.getLogger(__name__)


class HFExport(Hook):
    """Write ``directory/step-<n>`` as a complete Hugging Face directory, straight from the sharded live weights.

        HFExport("run/hf", model=model, ema=ema, base_model="assets/base", when=every(1000) | last())

    The training waits while each rank copies its own shards, cast, into CPU memory. A background thread of each rank
    writes them to their final places in the final files and reads them back; then rank 0 adds the other files and
    renames the directory. Make it on all ranks at the same point, after ``fully_shard`` / FSDP / DDP.

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
        ema: EMA | None = None,
        models: Literal["main", "ema", "both", "all"] = "all",
        dtype: Dtype = "bfloat16",
        keep: Retention | None = None,
        files: ExportFiles | None = None,
        weights: ExportWeights | None = None,
        writing: ExportWriting | None = None,
        verification: ExportVerification | None = None,
        push: ExportPush | None = None,
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
            dtype: Of all floating-point tensors, such as ``"bfloat16"``; ``"original"`` keeps each tensor's. Or by
                pattern of the names in the files, of which the first that matches decides:
                ``{"*norm*": "float32", "*": "bfloat16"}``. A tensor that matches none keeps its own.
            keep: Which exports to retain after a new one; None keeps all. The newest is always kept.
            files: The files beside the weights: base model, processor and more.
            weights: Where the weights come from, and how their files name and divide them.
            writing: How to write in the background; what to do if that is late or fails.
            verification: How to verify an export before it is published.
            push: Where on the Hugging Face Hub it goes then.
            **options: Fields of these five objects as keywords of their own: ``base_model="assets/base"`` stands for
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
        push = merge("HFExport", "push", ExportPush, push, options)
        if models in ("ema", "both") and ema is None:
            raise UsageError(f'HFExport(models="{models}") needs ema=: attach EMA(model) and pass it')
        self.directory = as_path(directory).absolute()
        # A store does not write in the middle of a file: there each is written by one rank, whatever was asked for.
        write_mode = "files" if isinstance(self.directory, RemotePath) else writing.write_mode
        if push.on_push_error == "raise" and writing.on_error == "warn":
            raise UsageError('HFExport(on_push_error="raise") needs on_error="raise", too')
        self._pushes, self._push = Pushes(push, self.directory, lambda event: self.emit(event)), push
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
        self._base: Path | None = None
        if files.base_model is not None:
            self._ranks.gather("finding the base model", lambda: self._find_base(str(files.base_model)))
        view = view_of(model, weights.adapters, held=weights.names == "auto")
        if files.base_model is not None and view is not None and view.stem == ADAPTER_WEIGHTS:
            raise UsageError(
                "an adapter has no base model beside it: pass processor= for the tokenizer, not base_model="
            )
        check_source(
            weights.source, weights.checkpoints, is_adapter=view is not None and not isinstance(view, HeldView)
        )
        asked = verification.verify_inputs, verification.verify_with
        self._answers = Answers(model, ema, *asked) if verification.verify == "load" else None
        self._state = LiveState(
            model,
            ema,
            ModelFiles.of(files, self._base),
            dtype=dtype,
            max_shard_size=weights.max_shard_size,
            names=weights.names,
            view=view,
        )
        writer, both = choose_writer(write_mode, self._ranks), (self._ranks, self._writer_ranks)
        self._copy = OpenCopy()
        if writing.staging == "overlap":
            self._copy.guard_all(ema)
        live = LiveSource(self._state, *both, writer, copy=self._copy, compare_replicas=verification.compare_replicas)
        saved: CheckpointSource | None = None
        if weights.checkpoints is not None:
            whole_files = write_mode == "files"
            saved = CheckpointSource(weights.checkpoints, self._state, *both, when=when, whole_files=whole_files)
        self._broken_off: set[int] = set()  # steps that a former run was writing; rank 0 knows
        self._failures: list[BaseException] = []  # not yet raised
        self._exported_step: int | None = None
        self._has_said_copied = False
        self._ranks.gather(f"preparing {self.directory}", self._prepare_directory if self._ranks.is_leader else bool)
        self._ranks.gather("reading the base model", self._state.read_files)
        self._directories = LiveDirectory.choose(chosen, weights.ema_as, view, self._state.stem)
        suffixes = [directory.suffix for directory in self._directories]
        self._steps = StepFolder(self.directory, keep, marker=PROVENANCE_FILE, suffixes=suffixes)
        self._in_flight = InFlight(len(self._directories))
        if writing.on_error == "raise":
            self.background = self._in_flight.background
        if weights.stages:
            self._state.unite(self._ranks)
        self._choose_source(weights.source, live, saved)

    def _find_base(self, name: str) -> None:
        self._base = find_model(name, fetch=False)

    def on_train_begin(self, step: int) -> None:
        """Make the export of the resumed step, if it was due and the former run died before it was made.

        All ranks; communicates. Earlier steps are not made up for, since their weights are gone: the log names them.
        """
        self._ranks.lead("setting aside what is half deleted", lambda: self._set_aside_unfinished(step))
        if self._ranks.is_leader:
            self._resume_pushes(step)
            self._steps.note_policy()
        if self.when.due(step) and self._ranks.lead(
            f"looking for the export of step {step}", lambda: self._missing(step)
        ):
            self._export(step, "wait")

    def on_step_end(self, step: int) -> None:
        """Export if it is time, then announce exports that have ended. All ranks; communicates when it exports."""
        due, error = attempted(lambda: self.when.due(step))
        if due or error:
            self._export(step, self._writing.when_busy, error)
        else:
            self._in_flight.collect(self._in_flight.ended())
        self._announce()
        if self._in_flight.background.tell is None:
            self._raise_failure()

    def on_occasion(self, step: int) -> None:
        """Export the step, if that was not done. All ranks; communicates."""
        if step != self._exported_step:
            self._export(step, self._writing.when_busy)

    def report_background(self) -> None:
        """Announce exports that have ended; raise what failed in one."""
        self._copy.settle()
        self._in_flight.collect(self._in_flight.ended())
        self._announce()
        self._raise_failure()

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
        self._announce()
        self._raise_failure()

    def close(self) -> None:
        """Wait for the exports in flight and for pushes to the Hub; raise what failed in them."""
        try:
            self.wait()
            self._wait_for_pushes()
            self._raise_failure()
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
        self._copy.settle()
        wanted = self._make_room(step, when_busy, error)
        if not wanted:
            return
        watch = Stopwatch()
        try:
            checks = [self._ask(step, self._directories[i]) for i in wanted]
            targets = [(self._directories[i], self._path(step, self._directories[i])) for i in wanted]
            begin = self._source.begin(step, targets, [self._in_flight.next_buffers[i] for i in wanted])
        except BaseException as failure:
            self.emit(event_of("export", step, self.directory / step_name(step), watch, self._ranks.size, failure))
            raise
        self._exported_step = step
        watch.released()
        self._in_flight.start(step, lambda: self._finish(step, begin, checks, watch))

    def _ask(self, step: int, directory: LiveDirectory) -> Check | None:
        """What a directory of the weights as they are now must pass."""
        checks: list[Check | None] = [None]
        if (answers := self._answers) is not None:
            phase = f"asking the live model for {self._path(step, directory).name}"
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
            return (in_flight.ended(), self._missing(step)) if self._ranks.is_leader else (0, [])

        ended, wanted = self._ranks.agree("looking for a free slot", look, lambda of_ranks: of_ranks[0])
        if len(wanted) < len(self._directories):
            log.warning("step %s was exported before the run was resumed; what is there is kept", step)
        if not wanted:
            return []
        busy = in_flight.started - ended >= SLOTS
        if busy and when_busy == "wait":
            ended += 1
        in_flight.collect(ended)
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
                paths = [job.commit() for job in jobs]
        except BaseException as error:
            log.exception("step %s was not exported", step)  # loud even if nobody comes to ask for the result
            self.emit(event_of("export", step, self.directory / step_name(step), watch, self._ranks.size, error))
            raise
        if self._writer_ranks.is_leader:
            with logged(f"measuring {paths[0]}"):
                self._say(step, jobs, watch)
            self._pushes.start(step, paths, partial(self._note_push_error, step))
            self._steps.remove_old(self, spare=self._pushes.pending)
        return paths

    def _say(self, step: int, jobs: Sequence[JointExport], watch: Stopwatch) -> None:
        """What was exported; once also of which tensors there is no average. Rank 0, in the background."""
        for job in jobs:
            event = event_of("export", step, job.plan.output, watch, self._ranks.size)
            log.info("exported %s; %s", event.line, job.measure)
            self.emit(event)
        copied = [name for job in jobs for name in job.plan.not_averaged]
        if copied and not self._has_said_copied:
            self._has_said_copied = True
            more = f" and {len(copied) - 5} more" if len(copied) > 5 else ""
            advice = "EMA(buffers=True) averages buffers, too"
            log.info("not averaged, as in the main weights: %s%s (%s)", ", ".join(copied[:5]), more, advice)

    def _missing(self, step: int) -> list[int]:
        """The directories of the step, by number, that no earlier run of this training has left sound."""
        return [i for i, directory in enumerate(self._directories) if not is_sound(self._path(step, directory))]

    def _set_aside_unfinished(self, step: int) -> None:
        for aside in set_aside_unfinished(self.directory, step - 1, PROVENANCE_FILE):
            log.warning("%s was set aside: it has no shardsmith.json, and its step is to come (again)", aside)
        for lost in sorted(lost for lost in self._broken_off if lost < step and self._missing(lost)):
            words = "%s: the export of step %s was cut off with the former run, and this one goes on from step %s; "
            log.warning(words + "`shardsmith to-hf` makes it of a checkpoint", self.directory, lost, step)

    def _path(self, step: int, directory: LiveDirectory) -> Path:
        return self.directory / (step_name(step) + directory.suffix)

    def _announce(self) -> None:
        """Say which exports have ended well, and keep what failed in the others."""
        for one in self._in_flight.take_ended():
            error = one.future.exception()
            if error is not None:
                self._failures.append(error)
            elif (on_exported := self._writing.on_exported) is not None:
                _, error = attempted(partial(on_exported, one.step, one.future.result()[0]))
                self._note_callback_error(one, error)

    def _note_callback_error(self, one: Running, error: BaseException | None) -> None:
        """``on_exported`` has raised: the export stands, and all ranks raise after the same step."""
        if error is not None:
            log.error("on_exported of step %s failed; the export is there", one.step, exc_info=error)
            self._failures.append(error)
            self._in_flight.background.report(one.future, f"on_exported of step {one.step}: {error}")

    def _note_push_error(self, step: int, error: Exception) -> None:
        """A push has failed, as the log says: the export stands. Any thread of rank 0."""
        if self._push.on_push_error == "raise":
            self._failures.append(error)
            self._in_flight.background.report(None, f"push of step {step}: {error}")

    def _resume_pushes(self, step: int) -> None:
        with logged(f"{self.directory}: looking for exports that are still to be pushed"):
            self._pushes.resume(partial(self._note_push_error, step))

    def _wait_for_pushes(self) -> None:
        """What was spared for a push may go then. Does something on rank 0 alone."""
        if self._pushes.wait():
            self._steps.remove_old(self)

    def _raise_failure(self) -> None:
        """The first one, if that is wanted; those after it are in the log, as all are."""
        errors, self._failures = self._failures, []
        if errors and self._writing.on_error == "raise":
            raise errors[0]

    def _choose_source(self, source: str, live: LiveSource, saved: CheckpointSource | None) -> None:
        """All ranks; communicates."""
        self._source: LiveSource | CheckpointSource = live
        if saved is not None and (source == "checkpoint" or not live.is_possible(self._directories)):
            self._source = saved
        if self._source is live:
            self._ranks.gather("looking at the base model", lambda: self._state.check(compare=self._ranks.is_leader))

    def _prepare_directory(self) -> None:
        if self._base is not None:
            protect(self.directory / step_name(0), self._base)
        refuse_within_step(self.directory)
        check_writable(self.directory)
        steps = (unfinished_step(path.name) for path in sweep(self.directory))
        self._broken_off = {step for step in steps if step is not None}
