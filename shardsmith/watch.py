"""Export the steps of a run as they are committed, from another process or another machine.

What is to be done follows from the two folders alone: the checkpoints that are committed, and the exports that are. So
a watcher can be stopped, killed and started again, and several can work on the same folders.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import shlex
import signal
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

from shardsmith.checking.arguments import check_value
from shardsmith.checking.types import AnyPath
from shardsmith.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ShardsmithError,
    StorageError,
    TargetExistsError,
    UsageError,
    WriteError,
)
from shardsmith.export.adapter_plan import plan_export
from shardsmith.export.plan import ExportOptions, choose_stems
from shardsmith.export.report import remarks
from shardsmith.export.write import write_directories
from shardsmith.formats.by_path import known_checkpoint
from shardsmith.ground.commit import check_writable, remove, sweep
from shardsmith.ground.layout import PROVENANCE_FILE, parse_step, step_name
from shardsmith.ground.leases import hold
from shardsmith.ground.path_advice import not_there
from shardsmith.ground.remote_path import RemotePath, as_path
from shardsmith.ground.sizes import parse_size
from shardsmith.hf.base_files import choose_files
from shardsmith.hf.hf_directory import protect, read_config
from shardsmith.manifest.checkpoints import committed_steps
from shardsmith.manifest.metadata import has_manifest
from shardsmith.overview import step_folders

log = logging.getLogger(__name__)

_SUFFIXES = ("-ema", "")  # of the directories that a step may become, in the order in which they come and go


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchOptions:
    """Which steps to export, and how."""

    export: ExportOptions = field(default_factory=ExportOptions)
    models: Literal["main", "ema", "both", "all"] = "all"
    ema_as: Literal["auto", "file", "directory"] = "auto"
    every: int | None = None
    """Only multiples of this; None exports all steps."""
    keep_latest: int | None = None
    """So many of the newest exports are kept; None keeps all."""

    def __post_init__(self) -> None:
        """Raise UsageError for numbers that make no sense."""
        for name, number in (("every", self.every), ("keep_latest", self.keep_latest)):
            if number is not None and number < 1:
                raise UsageError(f"{name}: give a whole number from 1 on, not {number}")
        if self.export.max_shard_size is not None:
            parse_size(self.export.max_shard_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one step."""

    step: int
    output: Path
    status: Literal["exported", "elsewhere", "gone", "failed"]
    """``elsewhere``: somebody else exported it meanwhile. ``gone``: it was removed before it could be held."""
    nbytes: int = 0
    """Of all weights written."""
    seconds: float = 0.0
    error: Exception | None = None
    """Why it failed."""
    remarks: tuple[str, ...] = ()
    """What ``to-hf`` would say of it, such as changes in config.json, but for what was said of a step before."""


class Stop:
    """A flag to wait for. A signal handler may set it, which could lock up with ``threading.Event``."""

    def __init__(self) -> None:
        self._set = False
        # ``SimpleQueue.put`` is reentrant: a handler may call it while the same thread is in ``get``.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()

    def set(self) -> None:
        """End the waiting, now and for all times."""
        self._set = True
        self._wake.put(None)

    def is_set(self) -> bool:
        """Return whether it was set."""
        return self._set

    def wait(self, timeout_secs: float) -> None:
        """Return when it is set, or after this time."""
        if not self._set:
            # A token that was put stays in the queue, so a signal just before this is not missed.
            with contextlib.suppress(queue.Empty):
                self._wake.get(timeout=timeout_secs)


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[Stop]:
    """What the first SIGINT or SIGTERM sets; a second one does what it did before. Main thread only."""
    stop = Stop()

    def handle(number: int, _: FrameType | None) -> None:
        stop.set()
        # So that a second signal is not caught any more: the handler before may end the process at once.
        signal.signal(number, before[signal.Signals(number)])

    # None stands for a handler that was not set from Python; it cannot be set again.
    before = {which: signal.getsignal(which) or signal.SIG_DFL for which in (signal.SIGINT, signal.SIGTERM)}
    for which in before:
        signal.signal(which, handle)
    try:
        yield stop
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def pending_steps(
    committed: Iterable[int],
    exported: Collection[int],
    *,
    failed: Collection[int] = (),
    every: int | None = None,
    keep_latest: int | None = None,
) -> list[int]:
    """The committed steps that are to be exported now, oldest first. None that ``keep_latest`` would remove again."""
    wanted = {step for step in committed if step not in failed and (every is None or step % every == 0)}
    # From both folders: an export whose checkpoint is gone counts among the newest, too.
    kept = sorted(wanted.union(exported))[-keep_latest:] if keep_latest else wanted
    return sorted(wanted.intersection(kept).difference(exported))


class Watcher:
    """Exports the steps of one run folder to ``output/step-<n>``.

    Attributes:
        failed: Steps that could not be exported, and why. They are left out from then on, unless it was the disk or the
            store.
    """

    def __init__(self, checkpoints: Path, output: Path, base: Path, options: WatchOptions) -> None:
        """Verify that the output can be written to, and remove what dead watchers left there.

        Raises:
            UsageError: ``checkpoints`` is itself a checkpoint; a path is a URL that is not supported.
            ProtectedPathError: the output is no place to write to.
            CheckpointError: the base cannot be used.
            WriteError: the output cannot be written to.
        """
        checkpoints = as_path(check_value("Watcher", "checkpoints", checkpoints, AnyPath))
        output = as_path(check_value("Watcher", "output", output, AnyPath))
        base = as_path(check_value("Watcher", "base", base, AnyPath))
        if parse_step(checkpoints.name) is not None and has_manifest(checkpoints):
            raise UsageError(f"{checkpoints} is one checkpoint: give the folder that it is in, or use to-hf")
        self.checkpoints = checkpoints
        self.output = output
        self.base = base
        self.options = options
        self.failed: dict[int, Exception] = {}
        self._said: set[str] = set()
        self._seen: set[Path] = set()
        # Read here, so that a base that cannot be used is reported now and not at the first step.
        choose_files(base)
        read_config(base)
        protect(output, checkpoints, base)
        check_writable(output)
        # Of watchers that died; one that is alive holds a lock on what it writes.
        sweep(output)

    @property
    def has_steps(self) -> bool:
        """Whether there is a committed checkpoint, exported or not."""
        return bool(committed_steps(self.checkpoints))

    def follow(self, stop: Stop, interval_secs: float) -> Iterator[Outcome]:
        """Export what is there and what comes, until ``stop`` is set; a look that fails is logged, and made again."""
        while not stop.is_set():
            try:
                # A run that has not begun has no folder yet.
                yield from self.catch_up(stop, wait_for_folder=True)
            except (StorageError, OSError) as error:  # of listing: what fails in an export is its outcome
                log.warning("could not list the steps, and will try again: %s", error)
            stop.wait(interval_secs)

    def catch_up(self, stop: Stop, *, wait_for_folder: bool = False) -> Iterator[Outcome]:
        """Export what is there, oldest first, unless ``stop`` is set; what failed before in the same way goes unsaid.

        Folders of steps that no save of ours has completed are logged, once each.

        Raises:
            CheckpointNotFoundError: there is no run folder, or none but such steps, and ``wait_for_folder`` is off.
            StorageError, OSError: the steps cannot be listed.
        """
        if not wait_for_folder and not self.checkpoints.is_dir():
            raise not_there(self.checkpoints, "directory")
        # What failed for the disk is tried again in each round, and said again only if it fails in another way.
        known, self.failed = self.failed, self._still_bad()
        # Looked up anew after each export: that may take long, and the run goes on meanwhile.
        while not stop.is_set() and (pending := self._pending()):
            # The oldest first: retention of the run removes it first.
            outcome = self._export(pending[0])
            if outcome.error is not None:
                self.failed[outcome.step] = outcome.error
            if outcome.error is None or type(known.get(outcome.step)) is not type(outcome.error):
                yield outcome
            self._remove_old()
        # In a store each look at a folder is a request, so nobody who waits there looks at all of them again and again.
        if wait_for_folder and isinstance(self.checkpoints, RemotePath):
            return
        if not stop.is_set() and (passed_over := self._passed_over()):
            advice = self._advice(passed_over)
            if not wait_for_folder and not self.has_steps:
                raise CheckpointNotFoundError(self.checkpoints, advice)
            log.warning("%s: %s", self.checkpoints, advice)

    def _passed_over(self) -> dict[Path, str]:
        """Folders of steps that are not to be exported, each once, with its format: of others, or in a folder below."""
        found = sorted(step_folders(self.checkpoints))
        # Afterwards, so that one that is committed meanwhile is not among them.
        committed = {self.checkpoints / step_name(step) for step in committed_steps(self.checkpoints)}
        formats: dict[Path, str] = {}
        for step, path in found:
            is_elsewhere = bool(committed) and path.parent != self.checkpoints
            is_wanted = not is_elsewhere and step % (self.options.every or 1) == 0
            if not is_wanted or path in committed | self._seen or _is_export(path):
                continue
            with contextlib.suppress(CheckpointError):  # the run may have removed it
                formats[path] = known_checkpoint(path).format.name
        self._seen.update(formats)
        return formats

    def _advice(self, passed_over: Mapping[Path, str]) -> str:
        """What to do to export them all the same."""
        if below := dict.fromkeys(str(path.parent) for path in passed_over if has_manifest(path)):
            return f"the steps that Shardsmith saved are in a folder below; give {' or '.join(below)}"
        names = [f"{path.relative_to(self.checkpoints)} ({name})" for path, name in passed_over.items()]
        last = [*passed_over][-1]
        where = {"--checkpoint": last, "--base-model": self.base, "--output-dir": self.output / last.name}
        command = shlex.join(["shardsmith", "to-hf", *(str(word) for pair in where.items() for word in pair)])
        return (
            f"no save of Shardsmith has completed {', '.join(names)}; such a folder is left alone, since nothing in it "
            f"says that it is complete. When it is, export it: {command}"
        )

    def _pending(self) -> list[int]:
        every, keep_latest = self.options.every, self.options.keep_latest
        exported = committed_steps(self.output, PROVENANCE_FILE)
        committed = committed_steps(self.checkpoints)
        return pending_steps(committed, exported, failed=self.failed, every=every, keep_latest=keep_latest)

    def _still_bad(self) -> dict[int, Exception]:
        """Without what may be saved anew, and without what failed for the disk, not for the step."""
        there = committed_steps(self.checkpoints)
        return {step: error for step, error in self.failed.items() if step in there and not _may_pass(error)}

    def _export(self, step: int) -> Outcome:
        checkpoint, output = self.checkpoints / step_name(step), self.output / step_name(step)
        began = time.monotonic()
        held = False
        try:
            # Retention of the run leaves a held step alone; False where there are no locks, as in a store.
            with hold(checkpoint) as held:
                nbytes, said = self._write(checkpoint, output)
        except (ShardsmithError, OSError) as error:
            # Another watcher was faster: that is what was wanted.
            if isinstance(error, TargetExistsError) and _is_export(error.path):
                return Outcome(step=step, output=output, status="elsewhere")
            # A store that was away cannot be asked whether the step is there.
            if not held and not isinstance(error, StorageError) and not checkpoint.exists():
                return Outcome(step=step, output=output, status="gone")
            return Outcome(step=step, output=output, status="failed", error=error)
        # Each thing once: of a run most of it is the same at every step.
        new = tuple(line for line in said if line not in self._said)
        self._said.update(said)
        seconds = time.monotonic() - began
        return Outcome(step=step, output=output, status="exported", nbytes=nbytes, seconds=seconds, remarks=new)

    def _write(self, checkpoint: Path, output: Path) -> tuple[int, list[str]]:
        """Write the directories of a step that are not there yet; bytes of weights, and what is to be said of them."""
        known = known_checkpoint(checkpoint)
        stems = choose_stems(known, self.base, self.options.models, self.options.ema_as, self.options.export.average)
        outputs = [(as_path(f"{output}{suffix}"), names) for suffix, names in stems]
        plans = [
            plan_export(known, path, self.base, names, self.options.export)
            for path, names in outputs
            # The directory of the step itself appears last, so the others may be there without it.
            if path == output or not _is_export(path)  # a killed watcher may have made the others
        ]
        write_directories(plans)
        said = list(dict.fromkeys(line for plan in plans for line in remarks(plan)))
        return sum(plan.directory.nbytes for plan in plans), said

    def _remove_old(self) -> None:
        count = self.options.keep_latest
        # A slice up to ``-count``: all but the newest.
        for step in committed_steps(self.output, PROVENANCE_FILE)[:-count] if count else []:
            # The average's directory goes before the step's own: what is
            # left is a step without a second model, and no stray.
            for path in (self.output / f"{step_name(step)}{suffix}" for suffix in _SUFFIXES):
                try:
                    if _is_export(path):
                        remove(path)
                except (
                    WriteError,
                    StorageError,
                ) as error:  # the next export tries again, or another watcher was faster
                    log.warning("could not remove an old export: %s", error)


def _is_export(path: Path) -> bool:
    """Whether it is a committed export of ours."""
    return (path / PROVENANCE_FILE).is_file()


def _may_pass(error: Exception) -> bool:
    """Whether an error says nothing about the step: a full disk, a file system or a store that was away."""
    # Not ours, such as an OSError while reading: the disk, or a file system that was away.
    return isinstance(error, (WriteError, StorageError)) or not isinstance(error, ShardsmithError)
