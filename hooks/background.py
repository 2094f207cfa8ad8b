"""The background thread of one hook, whose failures all ranks raise after the same step."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from shardsmith.checking.arguments import checked
from shardsmith.errors import ShardsmithError, UsageError

log = logging.getLogger(__name__)

T = TypeVar("T")

# Futures of the last jobs, of which a failure may still be told.
_REMEMBERED = 64
# Stands for what failed beside the jobs, such as a callback or a push.
_NO_JOB = -1


def attempted(act: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The value of ``act``, or what it raised: for what must not end this rank's step before the others know of it."""
    try:
        return act(), None
    except Exception as error:
        return None, error


@contextlib.contextmanager
def logged(what: str) -> Iterator[None]:
    """Log what the body raises, and go on: for what comes after a commit, which stands whatever happens then."""
    try:
        yield
    except ShardsmithError as error:
        log.warning("%s failed: %s", what, error)
    except Exception:
        log.exception("%s failed", what)


def each_of(calls: Iterable[Callable[[], None]]) -> None:
    """Make all of the calls, also when one of them raises; the first error is raised in the end."""
    errors: list[Exception] = []
    for call in calls:
        try:
            call()
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


class Background:
    """Do one job after the other, the same on every rank, in a thread.

    Jobs fail on all ranks together, as ``Ranks`` sees to it, but not at the same moment: were each rank to raise as
    soon as it can, one might do so a step before the others, which would wait for it in vain.

    Attributes:
        tell: Tells all ranks which job has failed and why, so that they raise after the same step. Set by ``Hooks``;
            without it each rank raises when it likes.
    """

    tell: Callable[[int, str], None] | None = None

    @checked
    def __init__(self, name: str) -> None:
        """``name``: of the thread."""
        # One thread, so jobs run in the order of `submit`, which is the same on all ranks.
        self._thread = ThreadPoolExecutor(1, name)
        self._jobs: dict[int, Future[Any]] = {}
        self._begun = 0
        self._is_closed = False

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Do a job when those before it have ended. Raises UsageError after ``close``."""
        self.refuse_closed()
        number, self._begun = self._begun, self._begun + 1
        future = self._thread.submit(self._run, number, job)
        self._jobs[number] = future
        self._jobs.pop(number - _REMEMBERED, None)
        return future

    def refuse_closed(self) -> None:
        """Raise UsageError after ``close``."""
        if self._is_closed:
            raise UsageError("this hook was closed: make a new one, and new Hooks with it")

    def is_to_be_reported(self, future: Future[Any]) -> bool:
        """Return whether a job has ended and this rank may say so by itself, before it is told that all do."""
        # A job that failed waits until all ranks are told; success needs no agreement.
        return future.done() and (self.tell is None or future.exception() is None)

    def failed_here(self, number: int) -> bool:
        """Wait for a job; whether it failed on this rank."""
        if number == _NO_JOB:
            return False
        future = self._jobs.get(number)
        # A job that is forgotten by now counts as failed here: nothing more is raised for it.
        return future is None or future.exception() is not None

    def report(self, future: Future[Any] | None, error: str) -> None:
        """Let all ranks raise, though no job has failed: something that depends on one failed on this rank.

        Args:
            future: The job; None if it is none that all ranks have in common.
            error: What failed.
        """
        if self.tell is not None:
            self.tell(next((number for number, job in self._jobs.items() if job is future), _NO_JOB), error)

    def close(self) -> None:
        """Wait for all jobs."""
        self._is_closed = True
        self._thread.shutdown()

    def _run(self, number: int, job: Callable[[], T]) -> T:
        try:
            return job()
        # BaseException, as torch's error of a checkpoint is no Exception.
        except BaseException as error:
            if self.tell is not None:
                self.tell(number, f"{type(error).__name__}: {error}")
            raise


class SavesInFlight:
    """The saves of one hook that its thread has not finished, or that were not yet announced; the oldest first.

    On the main thread; no communication.
    """

    def __init__(self, background: Background | None, announce: Callable[[int, Path], None]) -> None:
        """Begin with none.

        Args:
            background: The thread; None for a hook that writes at once, of which nothing is ever in flight.
            announce: Called with step and path of each save that has ended well.
        """
        self._background = background
        self._announce = announce
        self._running: deque[tuple[int, Future[Path | None]]] = deque()

    def start(self, step: int, save: Callable[[], Path | None]) -> None:
        """Run a save in the background, or here where there is none. Its result is announced, if it is a path."""
        if self._background is None:
            self._say(step, save())
        else:
            self._running.append((step, self._background.submit(save)))

    def of_step(self, step: int) -> Future[Any] | None:
        """Return the save of a step; None if none is in flight."""
        return next((future for other, future in self._running if other == step), None)

    def announce_ended(self) -> None:
        """Announce what has ended, on ranks that need not wait to be told of it by others. No communication."""
        while self._running and self._background and self._background.is_to_be_reported(self._running[0][1]):
            self._take()

    def raise_ended(self) -> None:
        """Announce what has ended, up to the first that failed; raise what failed in it. No communication."""
        while self._running and self._running[0][1].done():
            self._take()

    def wait(self) -> None:
        """Wait for all of them: announce them, up to the first that failed; raise what failed in it."""
        while self._running:
            self._take()

    def _take(self) -> None:
        # Taken out first, so that a failure is raised once.
        step, future = self._running.popleft()
        self._say(step, future.result())

    def _say(self, step: int, path: Path | None) -> None:
        if path is not None:
            self._announce(step, path)
