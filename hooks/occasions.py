"""What makes a save or an export due besides the number of its step: time, a signal, a file that appears."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .stop_signals import StopSignals

_LOOK_SECS = 1.0
"""A file is looked for so often at most: on a shared file system that is a request."""


@dataclass(frozen=True, slots=True, repr=False)
class Minutes:
    """So many minutes have gone by, on rank 0's clock, since this last came or the hooks were made."""

    count: float

    def __repr__(self) -> str:
        return f"minutes({self.count:g})"


@dataclass(frozen=True, slots=True, repr=False)
class SignalCame:
    """A signal came to any rank."""

    which: signal.Signals

    def __repr__(self) -> str:
        return f"at_signal(signal.{self.which.name})"


@dataclass(frozen=True, slots=True, repr=False)
class FileAppeared:
    """Rank 0 sees a file, and deletes it."""

    path: Path

    def __repr__(self) -> str:
        return f"at_file({str(self.path)!r})"


Occasion = Minutes | SignalCame | FileAppeared


class OccasionWatch:
    """Looks on this rank whether occasions have come. Main thread."""

    def __init__(self, occasions: Iterable[Occasion], rank: int) -> None:
        """Handle the signals among them from now on, on every rank; look at clock and files on rank 0 only."""
        occasions = sorted(set(occasions), key=repr)
        self._signals = {one: StopSignals([one.which]) for one in occasions if isinstance(one, SignalCame)}
        now = time.monotonic()
        self._since = {one: now for one in occasions if isinstance(one, Minutes) and rank == 0}
        self._looked = {one: now - _LOOK_SECS for one in occasions if isinstance(one, FileAppeared) and rank == 0}
        self.is_idle = not (self._signals or self._since or self._looked)

    def come(self) -> list[str]:
        """Return those that have come since this was last asked, as text."""
        if self.is_idle:
            return []
        found: list[Occasion] = [one for one, signals in self._signals.items() if signals.take()]
        now = time.monotonic()
        for period, since in self._since.items():
            if now - since >= 60 * period.count:
                # From now on: periods that went by during one long step are not made up for.
                self._since[period] = now
                found.append(period)
        for file, looked in self._looked.items():
            if now - looked >= _LOOK_SECS:
                self._looked[file] = now
                # Deleted when it is seen, so that it comes once.
                found += [file] if _take(file.path) else []
        return [repr(one) for one in found]

    def restore(self) -> None:
        """Put back what handled the signals before."""
        for signals in self._signals.values():
            signals.restore()


def _take(path: Path) -> bool:
    """Whether a file is there; it is deleted. One that cannot be deleted does not count, or it would for ever."""
    try:
        os.unlink(path)
    except OSError:
        return False
    return True
