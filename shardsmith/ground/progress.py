"""Count the bytes that are read, for a progress bar of the command line.

Functions that read weights or hash files call ``advance``. It does nothing unless a command shows a bar.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

_listeners: list[Callable[[int], None]] = []


def advance(nbytes: int) -> None:
    """Report that so many bytes were read. Any thread may call it."""
    for listener in _listeners:
        listener(nbytes)


@contextlib.contextmanager
def listening(listener: Callable[[int], None]) -> Iterator[None]:
    """Call a function, from any thread, for all bytes that this process reads meanwhile."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
