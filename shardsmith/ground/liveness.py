"""Which ranks are alive, asked only when one has kept others waiting. While nobody waits, it costs the store nothing.

Each process has a thread that sleeps until another rank asks for a sign of life, and gives one whatever the training
is doing: a rank that is slow, or writes to a disk that stands still, answers at once. One that does not answer has
died, hangs with the interpreter's lock (GIL) held, or is stopped.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

log = logging.getLogger(__name__)

ANSWER_SECS = 6.0
"""How long a rank has for its answer, in seconds."""
LOST = "the connection to the job's store is lost; the rank or the launcher that held it has ended"
_KNOWN_DEAD_SECS = 1.0  # for an answer of one that gave none before
_FIRST_LOOK_SECS = 2.0  # how long a rank may keep others waiting until they look whether it is alive
# Between two looks at the store.
_FIRST_PAUSE_SECS, _LONGEST_PAUSE_SECS = 2e-4, 0.1
_RANKS_PER_PAUSE = 64  # that many ask at full pace; more ask more rarely, so that the store's server can keep up
# Of one wait, after which `give_up` is asked.
_SLICE_SECS = 1.0
# Keys in one request, and ranks asked for a sign of life at one look.
_ASKED_AT_ONCE = 64
_chance = random.Random()  # the training's own generator must go on as if nobody had waited
_LONG_SECS = 86400.0  # stores count milliseconds in 32 bits
_PREFIX = "shardsmith/alive"
_current: _Answering | None = None
_silent: set[int] = set()
"""Ranks of this job that gave no sign of life when they were last asked; nobody waits for them a second time."""
_shared: tuple[Any, Any] | None = None
_sharing = threading.Lock()


def own_connection() -> Any:
    """Return a new connection to the job's store, for a thread that blocks in it."""
    return _default_store().clone()


def shared_connection() -> Any:
    """Return this process's connection to the job's store, for operations that return at once. Any thread.

    Not for ``wait`` nor for ``get`` of a key that may not be there: they would keep the other threads out. The
    trainer's own connection is none for us, since its groups wait in it. All objects share this one: torch's server
    asks the name service for the host name of each client that connects, one after the other, which may take seconds
    each, and the connections of thousands of ranks would use up its sockets.
    """
    global _shared
    store = _default_store()
    with _sharing:
        if _shared is None or _shared[0] is not store:
            _shared = store, store.clone()
        return _shared[1]


def _default_store() -> Any:
    return dist.distributed_c10d._get_default_store()  # there is no public way to it


def answer_from_now_on() -> None:
    """Let other ranks ask whether this process is alive. Once for each job; any number of calls."""
    global _current
    store = _default_store()
    if _current is None or _current.store is not store:
        _silent.clear()  # they were of another job
        _current = _Answering(store, dist.get_rank())


class SilenceError(Exception):
    """Some ranks were not heard of.

    Attributes:
        dead: Those that give no sign of life any more.
        reason: Why nothing can be heard of them; None if they are only late.
    """

    def __init__(self, dead: list[int], reason: str | None) -> None:
        super().__init__(reason or "a rank is late")
        self.dead = dead
        self.reason = reason


def await_keys(
    store: Any,
    keys: Sequence[str],
    ranks: Sequence[int],
    limit_secs: float,
    *,
    give_up: Callable[[], bool] = lambda: False,
) -> None:
    """Wait until every key is in the store.

    Args:
        store: A connection that no other thread uses.
        keys: The keys to wait for.
        ranks: Which rank sets each key.
        limit_secs: How long to wait, in seconds.
        give_up: Asked about once a second, whether waiting has become pointless.

    Raises:
        SilenceError: a rank that is missing has died, is late, or the store is gone.
    """
    rank_of = dict(zip(keys, ranks, strict=True))
    pending = list(keys)
    deadline = time.monotonic() + limit_secs
    look = time.monotonic() + (_FIRST_LOOK_SECS if _silent.isdisjoint(ranks) else 0)
    # The first keys together: mostly all ranks come at about the same time.
    wanted = pending[:_ASKED_AT_ONCE]
    while pending:
        if _are_there(store, wanted, min(look, deadline, time.monotonic() + _SLICE_SECS)):
            pending = pending[len(wanted) :]
            wanted = pending[:_ASKED_AT_ONCE]
        else:
            late = time.monotonic() >= deadline or give_up()
            if late or time.monotonic() >= look:
                # Where the time is over anyway, or a rank is known to be dead, one more second must do.
                is_known = not _silent.isdisjoint(rank_of[key] for key in pending)
                _require_life(store, pending, rank_of, _KNOWN_DEAD_SECS if late or is_known else ANSWER_SECS)
                # Who waits for thousands of ranks looks more rarely.
                look = time.monotonic() + max(_FIRST_LOOK_SECS, len(ranks) / 500)
            if late:
                raise SilenceError([], None)
            wanted = pending[:1]  # to ask for several again and again would cost the store each time
    _silent.difference_update(ranks)


@contextlib.contextmanager
def asking_the_store() -> Iterator[None]:
    """Raise SilenceError if the store is gone while it is asked: between two requests whoever holds it may end."""
    try:
        yield
    except RuntimeError as error:  # DistNetworkError is one
        raise SilenceError([], LOST) from error


def _are_there(store: Any, keys: list[str], until: float) -> bool:
    """Return whether the keys have come by a point in time of ``time.monotonic``.

    Asks again and again: of a ``store.wait`` that ends without its keys torch prints warnings to stderr.

    Raises:
        SilenceError: the store is gone.
    """
    crowd = max(1.0, dist.get_world_size() / _RANKS_PER_PAUSE) if dist.is_initialized() else 1.0
    pause, longest = _FIRST_PAUSE_SECS * crowd, _LONGEST_PAUSE_SECS * crowd
    with asking_the_store():
        while not store.check(keys):
            left = until - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(longest, pause * 1.1)
    return True


def _require_life(store: Any, pending: list[str], rank_of: Mapping[str, int], limit_secs: float) -> None:
    """Raise SilenceError if one of the ranks that are missing has died, or if the store is gone."""
    with asking_the_store():
        # A sample: to ask all of thousands of ranks would take too long, and the next look takes others.
        asked = _chance.sample(pending, min(len(pending), _ASKED_AT_ONCE))
        dead = find_dead([rank_of[key] for key in asked if not store.check([key])], store, limit_secs)
    if dead:
        raise SilenceError(sorted(dead), "no heartbeat; it crashed, hung or was stopped")


def find_dead(ranks: Sequence[int], store: Any, limit_secs: float = ANSWER_SECS) -> list[int]:
    """Return those of ``ranks`` that have been alive in this job and give no sign of life any more.

    Any rank, any thread. Returns when all have answered, or after ``limit_secs``.

    Raises:
        RuntimeError: the store is gone, and the rank that held it.
    """
    # `add(0)` reads a counter, and makes it where there is none; `get` would wait for it.
    before = {rank: store.add(f"{_PREFIX}/{rank}", 0) for rank in ranks}
    silent = [rank for rank in ranks if before[rank]]  # one that has not come so far is slow, not dead
    # Who is alive adds one to its counter then.
    for rank in silent:
        store.set(f"{_PREFIX}/{rank}/asked", b"")
    pause, deadline = 0.005, time.monotonic() + limit_secs
    while silent and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(0.25, pause * 2)
        silent = [rank for rank in silent if store.add(f"{_PREFIX}/{rank}", 0) == before[rank]]
    _silent.difference_update(ranks)
    remember_silent(silent)
    return silent


def remember_silent(ranks: Sequence[int]) -> None:
    """Take these ranks for dead until they are heard of again, since this rank or rank 0 has asked them in vain."""
    _silent.update(ranks)


def was_heard_of(rank: int, store: Any) -> bool:
    """Return whether a rank has called ``answer_from_now_on`` in this job. Any rank, any thread."""
    return bool(store.add(f"{_PREFIX}/{rank}", 0))


class _Answering:
    """The thread of this process."""

    def __init__(self, store: Any, rank: int) -> None:
        self.store = store
        self._key = f"{_PREFIX}/{rank}"
        self._waiting, self._telling = own_connection(), shared_connection()
        self._is_over = False
        self._waiting.add(self._key, 1)
        self._thread = threading.Thread(target=self._run, name="shardsmith-alive", daemon=True)
        self._thread.start()
        atexit.register(self._close)

    def _run(self) -> None:
        try:
            while True:
                self._waiting.wait([f"{self._key}/asked"], timedelta(seconds=_LONG_SECS))
                if self._is_over:
                    return
                self._waiting.delete_key(f"{self._key}/asked")  # first, so that no question goes unanswered
                self._waiting.add(self._key, 1)
        except RuntimeError as error:  # the store is gone, and the rank that held it
            log.debug("other ranks can no longer check whether this rank is alive: %s", error)

    def _close(self) -> None:
        """End the thread before the interpreter ends, whose lock it might want then."""
        self._is_over = True
        try:
            self._telling.set(f"{self._key}/asked", b"")
        except RuntimeError:
            return
        self._thread.join(1.0)
