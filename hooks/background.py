"""The background thread of one hook, whose failures all ranks raise after the same step."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from shardsmith.errors import ShardsmithError, UsageError

log = logging.getLogger(__name__)

T = TypeVar("T")

_REMEMBERED = 64


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


class Background:
    """Do one job after the other, the same on every rank, in a thread.

    Jobs fail on all ranks together, as ``Ranks`` sees to it, but not at the same moment: were each rank to raise as
    soon as it can, one might do so a step before the others, which would wait for it in vain.

    Attributes:
        tell: Tells all ranks which job has failed and why, so that they raise after the same step. Set by ``Hooks``;
            without it each rank raises when it likes.
    """

    tell: Callable[[int, str], None] | None = None

    def __init__(self, name: str) -> None:
        """``name``: of the thread."""
        self._thread = ThreadPoolExecutor(1, name)
        self._jobs: dict[int, Future[Any]] = {}
        self._begun = 0
        self._is_closed = False

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Do a job when those before it have ended. Raises UsageError after ``close``."""
        if self._is_closed:
            raise UsageError("this hook was closed: make a new one, and new Hooks with it")
        number, self._begun = self._begun, self._begun + 1
        future = self._thread.submit(self._run, number, job)
        self._jobs[number] = future
        self._jobs.pop(number - _REMEMBERED, None)
        return future

    def is_to_be_reported(self, future: Future[Any]) -> bool:
        """Return whether a job has ended and this rank may say so by itself, before it is told that all do."""
        return future.done() and (self.tell is None or future.exception() is None)

    def failed_here(self, number: int) -> bool:
        """Wait for a job; whether it failed on this rank."""
        future = self._jobs.get(number)
        return future is None or future.exception() is not None

    def report(self, future: Future[Any], error: str) -> None:
        """Let all ranks raise, though the job has succeeded: something that depends on it failed on this rank."""
        if self.tell is not None:
            self.tell(next(number for number, job in self._jobs.items() if job is future), error)

    def close(self) -> None:
        """Wait for all jobs."""
        self._is_closed = True
        self._thread.shutdown()

    def _run(self, number: int, job: Callable[[], T]) -> T:
        try:
            return job()
        except BaseException as error:
            if self.tell is not None:
                self.tell(number, f"{type(error).__name__}: {error}")
            raise
