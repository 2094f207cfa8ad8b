"""Signals that ask a run to end."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any


class StopSignals:
    """Remembers that one of some signals came, and does nothing else in the handler: it may interrupt anything.

    A second SIGTERM is as good as the first, since a scheduler may send it to the launcher and to its workers, and the
    launcher passes it on. A second SIGINT does what SIGINT did before, so that a second Ctrl-C ends what hangs. In a
    process that was forked from this one SIGTERM does what it did before, or ``terminate()`` would not end it.
    """

    def __init__(self, signals: Sequence[signal.Signals]) -> None:
        """Handle these from now on. Main thread, unless there are none."""
        self._came = False
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}
        for which in signals:
            # None: the handler was not made in Python, and cannot be put back.
            self._before[which] = signal.getsignal(which) or signal.SIG_DFL
            signal.signal(which, self._handle)

    def take(self) -> bool:
        """Return whether one came since this was last asked."""
        came, self._came = self._came, False
        return came

    def restore(self) -> None:
        """Put back what handled them before, unless other code has taken over meanwhile."""
        for which, before in self._before.items():
            # Bound methods are equal if object and function are; each look makes a new one.
            if signal.getsignal(which) == self._handle:
                signal.signal(which, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        which = signal.Signals(number)
        before = self._before[which]
        if which == signal.SIGTERM and os.getpid() != self._process:
            signal.signal(which, before)  # a Ctrl-C goes to all of them, and must not end a loader's workers
            # Once more, for the handler that was there before.
            os.kill(os.getpid(), which)
            return
        self._came = True
        if which == signal.SIGINT:
            signal.signal(which, before)
        elif callable(before):
            before(number, frame)
