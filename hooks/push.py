"""Exports on their way to the Hugging Face Hub: in a thread of rank 0, one after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

from shardsmith.export.hub import branch_of, check_client, check_repository, push_export, without_progress_bars
from shardsmith.ground.commit import place_file, withdraw_file
from shardsmith.ground.layout import PROVENANCE_FILE, push_mark, pushed_step, step_name
from shardsmith.ground.logs import Stopwatch

from .background import logged
from .events import Event, event_of

if TYPE_CHECKING:
    from .options import ExportWriting

log = logging.getLogger(__name__)

Failed = Callable[[Exception], None]


class Pushes:
    """The pushes of one hook. Rank 0 alone; no communication.

    Until an export is on the Hub, an empty file beside it says so, by which a later run of the training goes on.
    """

    def __init__(self, options: ExportWriting, directory: Path, emit: Callable[[Event], None]) -> None:
        """Begin with none.

        Args:
            options: Where exports go.
            directory: Where the exports are.
            emit: Called from the thread with the event of each push.

        Raises:
            UsageError: the repository or the branch cannot be called so.
        """
        self._options = options
        self._directory = directory
        self._emit = emit
        self._pool: ThreadPoolExecutor | None = None
        self._running: dict[int, Future[None]] = {}
        if options.push_to_hub is None:
            return
        check_repository(options.push_to_hub)
        branch_of(options.revision, 0)
        check_client()

    @property
    def is_wanted(self) -> bool:
        """Whether exports are to be pushed."""
        return self._options.push_to_hub is not None

    @property
    def pending(self) -> set[int]:
        """Steps whose directories are still read."""
        # A copy, as another thread may add to it or clear it meanwhile.
        return {step for step, future in list(self._running.items()) if not future.done()}

    def start(self, step: int, directories: Sequence[Path], failed: Failed) -> None:
        """Push the directories of a step, when those before them are through.

        Args:
            step: The step.
            directories: The first goes to the branch, ``step-5-ema`` to one with ``-ema`` at the end of its name.
            failed: Called from the thread with what went wrong, which the log has, too.
        """
        if self.is_wanted:
            # The mark before the push: a run that is killed in between pushes at its next start.
            for directory in directories:
                with logged(f"noting that {directory} is to be pushed"):
                    mark = push_mark(directory)
                    if not mark.exists():
                        place_file(mark, b"")
            # One thread: commits to a branch follow one another in the order of the steps.
            self._pool = self._pool or ThreadPoolExecutor(1, "shardsmith-push")
            self._running[step] = self._pool.submit(self._push, step, directories, failed)

    def resume(self, failed: Failed) -> None:
        """Push what an earlier run of this training was to push, and has not. ``failed`` as in ``start``."""
        found: dict[int, list[Path]] = {}
        for mark in sorted(self._directory.iterdir()) if self.is_wanted else []:
            if (step := pushed_step(mark.name)) is None:
                continue
            export = mark.with_name(mark.stem.removeprefix("."))
            if (export / PROVENANCE_FILE).is_file():
                found.setdefault(step, []).append(export)
            else:  # retention has removed it
                withdraw_file(mark)
        for step, exports in sorted(found.items()):
            self.start(step, exports, failed)

    def wait(self) -> bool:
        """Wait for all of them; whether there were any. Raises nothing of what failed in them."""
        running = list(self._running.values())
        if any(not future.done() for future in running):
            log.info("waiting until the exports in %s are on the Hub", self._directory)
        wait(running)
        self._running.clear()
        return bool(running)

    def close(self) -> None:
        """Wait for all of them, and end the thread."""
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _push(self, step: int, directories: Sequence[Path], failed: Failed) -> None:
        for directory in directories:
            # The end of the directory's name, "-ema" or nothing.
            revision = self._options.revision + directory.name.removeprefix(step_name(step))
            watch = Stopwatch()
            # The training never waits for a push.
            watch.released()
            try:
                self._push_one(directory, revision)
                with logged(f"measuring {directory}"):
                    self._emit(event_of("push", step, directory, watch, 1))
            # One directory that fails does not hold up the next.
            except Exception as error:
                self._emit(event_of("push", step, directory, watch, 1, error))
                log.error(
                    "%s was not pushed: %s\nThe export is complete. The next run of this training tries again; "
                    "by hand: shardsmith push %s %s --revision %s",
                    *(directory, error, directory, self._options.push_to_hub, revision),
                )
                failed(error)

    def _push_one(self, directory: Path, revision: str) -> None:
        assert self._options.push_to_hub is not None
        repository, private = self._options.push_to_hub, self._options.push_private
        with without_progress_bars():
            place = push_export(directory, repository, revision=revision, private=private)
        log.info("pushed %s to %s", directory, place)
        with logged(f"noting that {directory} was pushed"):
            withdraw_file(push_mark(directory))
