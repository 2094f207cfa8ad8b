"""What one rank notices, all ranks act on after the same step, however far apart they are.

A rank must not stop, or raise, a step before the others: they would wait for it in the training's next collective. So
each rank has a thread that waits for word in the job's store. Whoever has something to tell puts word there. Then the
thread of every rank answers, at once and whatever its training is doing: after which step this rank can act at the
earliest, which is the next one that it finishes. Rank 0's thread hears all answers and publishes the latest of these
steps, after which all act; a rank that gets to the step of its own answer before that waits for it, and it comes from
threads that wait for nothing. Every other rank puts one value there and reads one, so that N ranks cost 2N.

While nobody has anything to tell, a step costs a lock that nobody else holds, and the store nothing.
"""

from __future__ import annotations

import atexit
import json
import logging
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from shardsmith.ground.liveness import (
    SilenceError,
    answer_from_now_on,
    await_keys,
    own_connection,
    shared_connection,
)
from shardsmith.ground.ranks import own_name, rank_and_size

log = logging.getLogger(__name__)

_LONG_SECS = 86400.0  # stores count milliseconds in 32 bits


class StepAgreement:
    """Make it on all ranks at the same point. With one rank there is nobody to agree with, and nothing is started."""

    def __init__(self, timeout_secs: float = 60.0) -> None:
        """``timeout_secs``: how long to wait for the thread of a living rank before each rank acts for itself."""
        self._rank, self._size = rank_and_size()
        self._timeout_secs = timeout_secs
        self._changed = threading.Condition()
        self._passed = 0  # the last step that the training has gone past
        self._promised: int | None = None  # it goes past no step from this one on before the round has ended
        self._untold: list[Any] = []  # of this rank, and no round with it has ended
        self._settled: list[tuple[int, list[Any]]] = []
        self._round = 0
        self._is_closing = False
        self._is_over = self._size == 1
        if not self._is_over:
            self._name = own_name()
            self._waiting, self._telling = own_connection(), shared_connection()
            answer_from_now_on()
            self._thread = threading.Thread(target=self._run, name="shardsmith-agreement", daemon=True)
            self._thread.start()
            atexit.register(self.close)

    def tell(self, notice: Any) -> None:
        """Let all ranks have this from ``due`` after the same step. Any thread of any rank; returns at once.

        Args:
            notice: Fit for JSON. That of several ranks is passed on once if it is equal.
        """
        with self._changed:
            self._untold.append(notice)
            this_round = self._round
        self._send_word(this_round)

    def due(self, step: int) -> list[Any]:
        """Return what was told and is to be acted on now. Main thread, all ranks, after each step.

        It waits only for a round that is under way, which no rank's training holds up.
        """
        with self._changed:
            # Something untold means that a round is to come, and this step must not be passed before it.
            while not self._is_over and (self._untold or (self._promised is not None and step >= self._promised)):
                self._changed.wait()
            found = [notice for at, notices in self._settled if at <= step for notice in notices]
            self._settled = [(at, notices) for at, notices in self._settled if at > step]
            # Without the others, each rank acts on what it told itself.
            if self._is_over:
                found, self._untold = found + self._untold, []
            self._passed = step
        return [notice for i, notice in enumerate(found) if notice not in found[:i]]

    def close(self) -> None:
        """End it, for the other ranks too: what is told from now on, each rank has for itself. No communication."""
        with self._changed:
            if self._is_closing or self._size == 1:
                return
            self._is_closing = True
            this_round = self._round
        atexit.unregister(self.close)
        self._send_word(this_round)
        # A store whose host has stopped keeps whoever asks it for ever. The thread is left behind then.
        self._thread.join(self._timeout_secs)
        if self._thread.is_alive():
            log.warning("the job's store, which rank 0 or the launcher holds, does not answer: not waiting for it")

    def _run(self) -> None:
        try:
            while self._settle(self._await_word()):
                pass
        except (RuntimeError, SilenceError) as error:  # the store is gone, or a rank
            log.debug("ranks can no longer tell each other of failures and signals: %s", error)
        finally:
            with self._changed:
                self._is_over, self._promised = True, None
                self._changed.notify_all()

    def _await_word(self) -> bool:
        """Wait for something to agree on; whether word was seen. Raises RuntimeError if the store is gone."""
        began = time.monotonic()
        while not self._untold and not self._is_closing:
            try:
                self._waiting.wait([f"{self._name}/{self._round}/word"], timedelta(seconds=_LONG_SECS))
                return True
            except RuntimeError:
                # Only the time of one wait is over: wait again. Sooner, it means that the store is gone.
                if time.monotonic() - began < _LONG_SECS:
                    raise
                began = time.monotonic()
        return False

    def _settle(self, word_is_there: bool) -> bool:
        """One round. False if a rank has closed or died, which ends the agreement."""
        with self._changed:
            # From here to the verdict the main thread goes past no step from the promised one on.
            promise = None if self._is_closing else self._passed + 1
            self._promised, told = promise, [*self._untold]
        key = f"{self._name}/{self._round}"
        self._waiting.set(f"{key}/{self._rank}", json.dumps([promise, told]))
        if not word_is_there:  # it may have been sent for the round before, which did not carry what was told
            self._waiting.set(f"{key}/word", b"")
        # A rank that closes has answered None; no verdict concerns it.
        verdict = self._judge(key) if self._rank == 0 else None if promise is None else self._await_verdict(key)
        if verdict is None:
            return False
        step, notices = verdict
        with self._changed:
            self._settled.append((step, notices))
            # What was told during the round is for the next one.
            self._untold = [notice for notice in self._untold if notice not in notices]
            self._promised = None
            self._round += 1
            self._changed.notify_all()
        return True

    def _judge(self, key: str) -> tuple[int, list[Any]] | None:
        """Rank 0: hear all answers; publish after which step all act, and on what. None: the agreement is over."""
        verdict = None
        answers: list[tuple[int | None, list[Any]]] = []
        try:
            answers = [] if self._is_closing else self._hear(key)
            steps = [step for step, _ in answers if step is not None]
            if len(steps) == self._size:
                verdict = max(steps), [notice for _, told in answers for notice in told]
        finally:
            # Also after an error: the other ranks wait for it.
            self._waiting.set(f"{key}/verdict", json.dumps(verdict))
        # Whoever has answered in this round has read the verdict on the one before. A rank 0 that closes has heard
        # nobody: another one may just be reading it, and would wait for ever for what is deleted under it.
        if answers:
            self._forget(self._round - 1)
        return verdict

    def _hear(self, key: str) -> list[tuple[int | None, list[Any]]]:
        keys = [f"{key}/{rank}" for rank in range(self._size)]
        self._await(keys, range(self._size))
        return [json.loads(answer) for answer in self._waiting.multi_get(keys)]

    def _await_verdict(self, key: str) -> tuple[int, list[Any]] | None:
        self._await([f"{key}/verdict"], [0])
        verdict = json.loads(self._waiting.get(f"{key}/verdict"))
        return verdict and (verdict[0], verdict[1])

    def _await(self, keys: Sequence[str], ranks: Sequence[int]) -> None:
        """Raises SilenceError if a rank does not answer, or this one is being closed meanwhile."""
        await_keys(self._waiting, keys, ranks, self._timeout_secs, give_up=lambda: self._is_closing)

    def _forget(self, old_round: int) -> None:
        for name in ("word", "verdict", *range(self._size)) if old_round >= 0 else ():
            try:
                self._waiting.delete_key(f"{self._name}/{old_round}/{name}")
            except RuntimeError as error:  # some stores cannot delete; the keys are small
                log.debug("could not delete: %s", error)

    def _send_word(self, this_round: int) -> None:
        if not self._is_over:
            try:
                self._telling.set(f"{self._name}/{this_round}/word", b"")
            except RuntimeError as error:  # as above, which the thread notices as well
                log.debug("could not tell the other ranks: %s", error)
