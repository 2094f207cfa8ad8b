"""Who we are among how many, and how the ranks agree: an error on one rank is an error on all.

Ranks talk through the job's key-value store, on a connection of ours, and never by collectives: so a background
thread may use it while the main thread trains, and a rank that raises leaves no other rank waiting in a barrier.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from shardsmith.errors import RankFailedError, RanksDisagreeError, RankTimeoutError
from shardsmith.ground.liveness import (
    LOST,
    SilenceError,
    answer_from_now_on,
    asking_the_store,
    await_keys,
    remember_silent,
    shared_connection,
    was_heard_of,
)

log = logging.getLogger(__name__)

T = TypeVar("T")
D = TypeVar("D")
_numbers = itertools.count()

_PART_BYTES = 1 << 20  # of a value in the store; its server refuses 8 MiB
_MAX_BYTES = 4 << 20
_DELETED_AT_ONCE = 64
_READ_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What one rank has to say after a phase: a value, or the text of an error."""

    phase: str
    value: Any = None
    error: str | None = None

    def encode(self) -> bytes:
        return json.dumps([self.phase, self.value, self.error], separators=(",", ":")).encode()

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
        self._key = ""  # of the exchange that this rank is in, or was in last
        self._answered: list[str] = []
        self._read: list[str] = []  # by every rank, so nobody needs them any more
        self._deleting: threading.Thread | None = None
        self._store: Any = shared_connection() if self.size > 1 else None
        if self.size > 1:
            answer_from_now_on()

    @property
    def is_leader(self) -> bool:
        """Whether this is rank 0, which alone makes, renames and deletes directories."""
        return self.rank == 0

    def gather(self, phase: str, body: Callable[[], T], *, large: bool = False) -> list[T]:
        """Run ``body`` on every rank; rank 0 returns all values in rank order, the others an empty list.

        All ranks call it with the same phase, in the same order, from any thread. Communicates through the store.

        Args:
            phase: What is being done, for error messages.
            body: Its value must survive JSON.
            large: A value may have more than 4 MiB as JSON. Without this it is refused on all ranks: what grows with
                ranks or tensors belongs on disk.

        Raises:
            RankFailedError: on every rank, if ``body`` raised on any, a value is too large, or a rank is in another
                phase. With one rank, the original error. So it is on a rank whose ``body`` was to end the process
                (``KeyboardInterrupt``, ``SystemExit``).
            RankTimeoutError: on every rank, if one was not heard of in time or has died, which takes some 10 seconds.
        """
        return self._exchange(phase, body, len, large)[0]

    def agree(self, phase: str, body: Callable[[], T], decide: Callable[[list[T]], D], *, large: bool = False) -> D:
        """Run ``body`` on every rank, ``decide`` on rank 0 with all values in rank order; its value on every rank.

        As ``gather`` followed by ``lead``, in one exchange. All ranks call it; raises what those raise.
        """
        decision: D = self._exchange(phase, body, decide, large)[1]
        return decision

    def deal(
        self, phase: str, body: Callable[[], T], decide: Callable[[list[T]], Sequence[D]], *, large: bool = False
    ) -> D:
        """Run ``body`` on every rank, ``decide`` on rank 0 with all values; each rank gets its own answer.

        As ``agree``, for what would grow with the square of the ranks if every rank were told all of it.
        """
        own: D = self._exchange(phase, body, decide, large, is_dealt=True)[1]
        return own

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
        # The key of this exchange: all ranks count them alike.
        key = f"{self._name}/{next(self._phases)}"
        outcome, cause = _attempt(phase, body, large=True) if self.is_leader else (None, None)
        if outcome is not None:
            self._go_if_ending(key, outcome, cause)
            self._answered += self._put(key, outcome)
        else:
            outcome = self._get(key, phase, self.timeout_secs)
        if outcome.error is not None:
            raise RankFailedError(phase, {0: outcome.error}, self.size) from cause
        if outcome.phase != phase:
            raise RanksDisagreeError(f"rank {self.rank} is at {phase!r}, rank 0 at {outcome.phase!r}")
        value: T = outcome.value
        return value

    def refuse(self, phase: str, error: BaseException) -> None:
        """Answer the exchange that comes next with an error, and do not wait: this rank does not take part in it.

        For a rank that raises by itself, so that the others raise at once, too. One rank; communicates through the
        store, as far as it is there.
        """
        if self.size > 1:
            with contextlib.suppress(RuntimeError):
                self._answer(f"{self._name}/{next(self._phases)}", _failed(phase, error))

    def missing(self) -> dict[int, bool]:
        """Return the ranks that have not come to the exchange this rank waits in, and whether each was heard of before.

        From another thread than the one that waits. Communicates through the store, with nobody else.

        Raises:
            RuntimeError: the store is gone.
        """
        store = self._store
        others = [rank for rank in range(1, self.size) if rank != self.rank]
        missing = [rank for rank in others if not store.check([f"{self._key}/{rank}"])]
        # Each other rank puts its own outcome; rank 0 alone puts the verdict.
        if not self.is_leader:
            missing = missing or [0]  # it says nothing before it has heard all others
        return {rank: was_heard_of(rank, store) for rank in missing}

    def _exchange(
        self, phase: str, body: Callable[[], T], decide: Callable[[list[T]], Any], large: bool, is_dealt: bool = False
    ) -> tuple[list[T], Any]:
        """The values of all ranks, on rank 0 alone, and what rank 0 decided on them, for all or for this rank."""
        if self.size == 1:
            values = [body()]
            return values, decide(values)[0] if is_dealt else decide(values)
        mine, cause = _attempt(phase, body, large=large)
        key = self._key = f"{self._name}/{next(self._phases)}"
        self._go_if_ending(key, mine, cause)
        try:
            if self.is_leader:
                values, verdict, decided = self._judge(key, phase, mine, decide, is_dealt)
                cause = cause or decided
            else:
                self._put(f"{key}/{self.rank}", mine)
                values, verdict = [], self._await_verdict(key, phase)
        except RankTimeoutError as error:
            raise error from cause
        if verdict["failures"]:
            failures = {int(rank): text for rank, text in verdict["failures"].items()}
            raise RankFailedError(phase, failures, self.size) from cause
        if is_dealt and not self.is_leader:  # it was put before the verdict
            return values, self._get(f"{key}/own/{self.rank}", phase, self.timeout_secs).value
        return values, verdict["decision"]

    def _judge(
        self, key: str, phase: str, mine: _Outcome, decide: Callable[[list[T]], Any], is_dealt: bool
    ) -> tuple[list[T], dict[str, Any], BaseException | None]:
        """Rank 0: hear all ranks, decide, and tell them. The values, the verdict, and what ``decide`` raised."""
        outcomes = [mine, *self._hear(key, phase)]
        values = [outcome.value for outcome in outcomes]
        failures = {rank: outcome.error for rank, outcome in enumerate(outcomes) if outcome.error is not None}
        decision, cause = (_Outcome(phase), None) if failures else _attempt(phase, lambda: decide(values), large=True)
        if decision.error is not None:
            failures[0] = decision.error
        verdict, put = {"failures": failures, "decision": decision.value}, list[str]()
        # Each rank's own answer first: it is read as soon as the verdict is there.
        if is_dealt and not failures:
            verdict["decision"], *others = decision.value
            for rank, own in enumerate(others, 1):
                put += self._put(f"{key}/own/{rank}", _Outcome(phase, own))
        put += self._put(f"{key}/verdict", _Outcome(phase, {**verdict, "decision": None} if is_dealt else verdict))
        # every rank has spoken in this phase, so it has read what was put for the phases before
        self._forget([*self._answered, *self._keys(key)])
        self._answered = put
        return values, verdict, cause

    def _hear(self, key: str, phase: str) -> list[_Outcome]:
        """What the other ranks say, in rank order."""
        keys = self._keys(key)
        try:
            await_keys(self._store, keys, range(1, self.size), self.timeout_secs)
            with asking_the_store():
                heard = [_Outcome.decode(self._whole(name, data)) for name, data in self._values(keys)]
        except SilenceError as silence:
            missing = [rank for rank, key_of_rank in enumerate(keys, 1) if not self._has(key_of_rank)]
            # What is known to be dead says more than what has not come yet.
            missing = silence.dead or missing
            with contextlib.suppress(RankTimeoutError):  # of this rank's own connection
                self._put(f"{key}/verdict", _Outcome(phase, [missing, silence.reason], error="no answer"))
            raise RankTimeoutError(phase, missing, self.timeout_secs, silence.reason) from silence.__cause__
        return [
            outcome
            if outcome.phase == phase or outcome.error  # else it gave up an earlier phase that we still waited in
            else _Outcome(phase, error=f"RanksDisagreeError: is at {outcome.phase!r} instead")
            for outcome in heard
        ]

    def _await_verdict(self, key: str, phase: str) -> dict[str, Any]:
        # rank 0 may itself wait for timeout_secs before it gives up, so the others allow it a little longer
        outcome = self._get(f"{key}/verdict", phase, self.timeout_secs * 1.1 + 5)
        if outcome.error is not None:
            missing, reason = outcome.value
            remember_silent(missing if reason else ())
            raise RankTimeoutError(phase, missing, self.timeout_secs, reason)
        verdict: dict[str, Any] = outcome.value
        return verdict

    def _go_if_ending(self, key: str, mine: _Outcome, cause: BaseException | None) -> None:
        """If this process is to end (Ctrl-C, ``sys.exit``), tell the others so, who would wait for it, and let it."""
        if cause is not None and not isinstance(cause, _failures()):
            with contextlib.suppress(RuntimeError):
                self._answer(key, mine)
            raise cause

    def _answer(self, key: str, failed: _Outcome) -> None:
        """Let an exchange of any kind fail on all ranks, without waiting for them."""
        if self.is_leader:
            self._put(key, failed)
            self._put(f"{key}/verdict", _Outcome(failed.phase, {"failures": {0: failed.error}, "decision": None}))
        else:
            self._put(f"{key}/{self.rank}", failed)

    def _keys(self, key: str) -> list[str]:
        return [f"{key}/{rank}" for rank in range(1, self.size)]

    def _put(self, key: str, outcome: _Outcome) -> list[str]:
        """Tell the others, and return the keys: what is long has several, of which the first is put last."""
        data = outcome.encode()
        parts = [data[at : at + _PART_BYTES] for at in range(0, len(data), _PART_BYTES)]
        names = [f"{key}/part-{number}" for number in range(1, len(parts))]
        try:
            for name, part in zip(names, parts[1:], strict=True):
                self._store.set(name, part)
            self._store.set(key, b"%d:" % len(parts) + parts[0])
        except RuntimeError as error:
            raise RankTimeoutError(outcome.phase, [0], self.timeout_secs, LOST) from error
        return [key, *names]

    def _whole(self, key: str, data: bytes) -> bytes:
        """The value that was put, of which the first part is there already."""
        count, _, first = data.partition(b":")
        names = [f"{key}/part-{number}" for number in range(1, int(count))]
        whole = b"".join([first, *(self._store.get(name) for name in names)])
        if self.is_leader:
            self._read += names
        return whole

    def _values(self, keys: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Some at a time: of thousands of long values not all are there twice, as they came and decoded."""
        for begin in range(0, len(keys), _READ_AT_ONCE):
            some = [*keys[begin : begin + _READ_AT_ONCE]]
            yield from zip(some, self._store.multi_get(some), strict=True)

    def _has(self, key: str) -> bool:
        try:
            return bool(self._store.check([key]))
        except RuntimeError:  # the store is gone, and the rank that held it
            return False

    def _forget(self, keys: list[str]) -> None:
        """Have keys deleted that every rank has read. Many take their time, so that is no business of this thread."""
        self._read += keys
        if len(self._read) >= _DELETED_AT_ONCE and not (self._deleting and self._deleting.is_alive()):
            old, self._read = self._read, []
            self._deleting = threading.Thread(target=_delete, args=(self._store, old), daemon=True)
            self._deleting.start()

    def _get(self, key: str, phase: str, limit_secs: float) -> _Outcome:
        """What rank 0 says under a key."""
        try:
            await_keys(self._store, [key], [0], limit_secs)
            with asking_the_store():
                whole = self._whole(key, self._store.get(key))
            return _Outcome.decode(whole)
        except SilenceError as silence:
            raise RankTimeoutError(phase, [0], self.timeout_secs, silence.reason) from silence.__cause__


def _delete(store: Any, keys: list[str]) -> None:
    for key in keys:
        try:
            store.delete_key(key)
        except RuntimeError as error:  # some stores cannot delete; the keys are small
            log.debug("could not delete %s: %s", key, error)


def _attempt(phase: str, body: Callable[[], T], *, large: bool) -> tuple[_Outcome, BaseException | None]:
    """Run ``body``; an error becomes an outcome, so that this rank can still tell the others."""
    try:
        outcome = _Outcome(phase, body())
        nbytes = len(outcome.encode())  # what is no JSON is an error of this rank, too
        if nbytes > _MAX_BYTES and not large:
            raise ValueError(
                f"{nbytes} bytes are too many to tell the other ranks ({_MAX_BYTES} are allowed): pass large=True "
                "where that is meant to be"
            )
        return outcome, None
    except BaseException as error:
        log.debug("failed", exc_info=True)
        return _failed(phase, error), error


def _failed(phase: str, error: BaseException) -> _Outcome:
    return _Outcome(phase, error=f"{type(error).__name__}: {error}")


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
