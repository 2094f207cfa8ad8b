"""The background thread of one hook, whose failures all ranks raise after the same step."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

_REMEMBERED = 64


class Background:
    """Does one job after the other, the same on every rank, in a thread.

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

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Do a job when those before it have ended."""
        number, self._begun = self._begun, self._begun + 1
        future = self._thread.submit(self._run, number, job)
        self._jobs[number] = future
        self._jobs.pop(number - _REMEMBERED, None)
        return future

    def is_to_be_reported(self, future: Future[Any]) -> bool:
        """Whether a job has ended and this rank may say so by itself, before it is told that all do."""
        return future.done() and (self.tell is None or future.exception() is None)

    def failed_here(self, number: int) -> bool:
        """Wait for a job; whether it failed on this rank."""
        future = self._jobs.get(number)
        return future is None or future.exception() is not None

    def close(self) -> None:
        """Wait for all jobs."""
        self._thread.shutdown()

    def _run(self, number: int, job: Callable[[], T]) -> T:
        try:
            return job()
        except BaseException as error:
            if self.tell is not None:
                self.tell(number, f"{type(error).__name__}: {error}")
            raise
