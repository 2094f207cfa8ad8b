"""Who we are among how many, and how the ranks agree: an error on one rank is an error on all.

Ranks talk through the job's key-value store, on a connection of their own, and never by collectives: so a background
thread may use it while the main thread trains, and a rank that raises leaves no other rank waiting in a barrier.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from shardsmith.errors import RankFailedError, RanksDisagreeError, RankTimeoutError

log = logging.getLogger(__name__)

T = TypeVar("T")
D = TypeVar("D")
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What one rank has to say after a phase: a value, or the text of an error."""

    phase: str
    value: Any = None
    error: str | None = None

    def encode(self) -> str:
        return json.dumps([self.phase, self.value, self.error])

    @classmethod
    def decode(cls, data: bytes) -> _Outcome:
        return cls(*json.loads(data))


class Ranks:
    """The ranks of a job, acting in phases. Make it on every rank at the same point, as one makes a process group.

    Attributes:
        rank: This process, 0 .. size - 1.
        size: Number of ranks; 1 without ``torch.distributed``.
        timeout_secs: How long a phase may wait for a rank before it is given up.
    """

    def __init__(self, timeout_secs: float = 1800.0) -> None:
        self.rank, self.size = rank_and_size()
        self.timeout_secs = timeout_secs
        self._phases = itertools.count()
        self._name = own_name()
        self._answered: list[str] = []
        self._store: Any = own_connection() if self.size > 1 else None

    @property
    def is_leader(self) -> bool:
        """Whether this is rank 0, which alone makes, renames and deletes directories."""
        return self.rank == 0

    def gather(self, phase: str, body: Callable[[], T]) -> list[T]:
        """Run ``body`` on every rank; rank 0 returns all values in rank order, the others an empty list.

        All ranks call it with the same phase, in the same order, from any thread. Communicates through the store.

        Args:
            phase: What is being done, for error messages.
            body: Its value must survive JSON.

        Raises:
            RankFailedError: on every rank, if ``body`` raised on any, or one is in another phase. With one rank, the
                original error.
            RankTimeoutError: on every rank, if one was not heard of in time.
        """
        return self._exchange(phase, body, len)[0]

    def agree(self, phase: str, body: Callable[[], T], decide: Callable[[list[T]], D]) -> D:
        """Run ``body`` on every rank, ``decide`` on rank 0 with all values in rank order; its value on every rank.

        As ``gather`` followed by ``lead``, in one exchange. All ranks call it; raises what those raise.
        """
        return self._exchange(phase, body, decide)[1]

    def lead(self, phase: str, body: Callable[[], T]) -> T:
        """Run ``body`` on rank 0 alone and return its value on every rank.

        All ranks call it. Communicates through the store. The value must survive JSON.

        Raises:
            RankFailedError: on every rank, if ``body`` raised. With one rank, the original error.
            RankTimeoutError: rank 0 was not heard of in time.
            RanksDisagreeError: rank 0 is in another phase.
        """
        if self.size == 1:
            return body()
        key = f"{self._name}/{next(self._phases)}"
        outcome, cause = _attempt(phase, body) if self.is_leader else (None, None)
        if outcome is not None:
            self._put(key, outcome)
            self._answered.append(key)
        else:
            outcome = self._get(key, phase, [0], time.monotonic() + self.timeout_secs)
        if outcome.phase != phase:
            raise RanksDisagreeError(f"rank {self.rank} is at {phase!r}, rank 0 at {outcome.phase!r}")
        if outcome.error is not None:
            raise RankFailedError(phase, {0: outcome.error}, self.size) from cause
        value: T = outcome.value
        return value

    def _exchange(self, phase: str, body: Callable[[], T], decide: Callable[[list[T]], D]) -> tuple[list[T], D]:
        """The values of all ranks, on rank 0 alone, and what rank 0 decided on them."""
        if self.size == 1:
            values = [body()]
            return values, decide(values)
        mine, cause = _attempt(phase, body)
        key = f"{self._name}/{next(self._phases)}"
        try:
            if self.is_leader:
                values, verdict, decided = self._judge(key, phase, mine, decide)
                cause = cause or decided
            else:
                self._put(f"{key}/{self.rank}", mine)
                values, verdict = [], self._await_verdict(key, phase)
        except RankTimeoutError as error:
            raise error from cause
        if verdict["failures"]:
            failures = {int(rank): text for rank, text in verdict["failures"].items()}
            raise RankFailedError(phase, failures, self.size) from cause
        return values, verdict["decision"]

    def _judge(
        self, key: str, phase: str, mine: _Outcome, decide: Callable[[list[T]], D]
    ) -> tuple[list[T], dict[str, Any], BaseException | None]:
        """Rank 0: hear all ranks, decide, and tell them. The values, the verdict, and what ``decide`` raised."""
        outcomes = [mine, *self._hear(key, phase)]
        values = [outcome.value for outcome in outcomes]
        failures = {rank: outcome.error for rank, outcome in enumerate(outcomes) if outcome.error is not None}
        decision, cause = (_Outcome(phase), None) if failures else _attempt(phase, lambda: decide(values))
        if decision.error is not None:
            failures[0] = decision.error
        verdict = {"failures": failures, "decision": decision.value}
        self._put(f"{key}/verdict", _Outcome(phase, verdict))
        # every rank has spoken in this phase, so it has read what was put for the phases before
        for old in [*self._answered, *self._keys(key)]:
            self._delete(old)
        self._answered = [f"{key}/verdict"]
        return values, verdict, cause

    def _hear(self, key: str, phase: str) -> list[_Outcome]:
        """What the other ranks say, in rank order."""
        keys = self._keys(key)
        try:
            self._store.wait(keys, timedelta(seconds=self.timeout_secs))
            heard = [_Outcome.decode(data) for data in self._store.multi_get(keys)]
        except RuntimeError as error:
            missing = [rank for rank, key_of_rank in enumerate(keys, 1) if not self._has(key_of_rank)]
            self._put(f"{key}/verdict", _Outcome(phase, missing, error="no answer"))
            raise RankTimeoutError(phase, missing, self.timeout_secs) from error
        return [
            outcome
            if outcome.phase == phase  # else it gave up an earlier phase that we still waited in
            else _Outcome(phase, error=f"RanksDisagreeError: is at {outcome.phase!r} instead")
            for outcome in heard
        ]

    def _await_verdict(self, key: str, phase: str) -> dict[str, Any]:
        # rank 0 may itself wait for timeout_secs before it gives up, so the others allow it a little longer
        deadline = time.monotonic() + self.timeout_secs * 1.1 + 5
        outcome = self._get(f"{key}/verdict", phase, [0], deadline)
        if outcome.error is not None:
            raise RankTimeoutError(phase, outcome.value, self.timeout_secs)
        verdict: dict[str, Any] = outcome.value
        return verdict

    def _keys(self, key: str) -> list[str]:
        return [f"{key}/{rank}" for rank in range(1, self.size)]

    def _put(self, key: str, outcome: _Outcome) -> None:
        self._store.set(key, outcome.encode())

    def _has(self, key: str) -> bool:
        try:
            return bool(self._store.check([key]))
        except RuntimeError:  # the store is gone, and the rank that held it
            return False

    def _delete(self, key: str) -> None:
        try:
            self._store.delete_key(key)
        except RuntimeError as error:  # some stores cannot delete; the keys are small
            log.debug("could not delete %s: %s", key, error)

    def _get(self, key: str, phase: str, silent: list[int], deadline: float) -> _Outcome:
        remaining = max(0.01, deadline - time.monotonic())
        try:
            self._store.wait([key], timedelta(seconds=remaining))
            return _Outcome.decode(self._store.get(key))
        except RuntimeError as error:  # too late; or the store is gone, and the rank that held it
            raise RankTimeoutError(phase, silent, self.timeout_secs) from error


@contextlib.contextmanager
def single_process_is_fine() -> Generator[None, None, None]:
    """torch warns of a save or load without a process group; a single process is a normal way to train."""
    if dist.is_available() and dist.is_initialized():
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _attempt(phase: str, body: Callable[[], T]) -> tuple[_Outcome, BaseException | None]:
    """Run ``body``; an error becomes an outcome, so that this rank can still tell the others."""
    try:
        return _Outcome(phase, body()), None
    except _failures() as error:
        log.debug("failed", exc_info=True)
        return _Outcome(phase, error=f"{type(error).__name__}: {error}"), error


def _failures() -> tuple[type[BaseException], ...]:
    """What a phase may fail with: torch's own error of a checkpoint is no Exception, and half a second to import."""
    checkpoint = sys.modules.get("torch.distributed.checkpoint.api")
    return (Exception, checkpoint.CheckpointException) if checkpoint else (Exception,)


def rank_and_size() -> tuple[int, int]:
    """Who we are, among how many; (0, 1) without ``torch.distributed``."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def own_name() -> str:
    """A prefix for keys in the store that nothing else uses. The same on every rank that asks at the same point."""
    return f"shardsmith/{next(_numbers)}"


def own_connection() -> Any:
    """A store client that no other thread uses: a blocking wait on a shared one would block the trainer's groups."""
    store: Any = dist.distributed_c10d._get_default_store()  # there is no public way to the job's store
    return store.clone()
