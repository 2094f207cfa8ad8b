"""What the loop is told: a line for each save and export, visible in scripts that do not configure logging."""

from __future__ import annotations

import logging
import os
import sys
import time

from shardsmith.ground.ranks import rank_and_size

VERBOSITY = "SHARDSMITH_VERBOSITY"
"""Environment variable: debug, info, warning, error or off. Default: info."""

_log = logging.getLogger("shardsmith")


class _Unconfigured(logging.StreamHandler):  # type: ignore[type-arg]
    """Prints to stderr while the program has no handler of its own; then that one prints, and this one is silent."""

    def emit(self, record: logging.LogRecord) -> None:
        """Below warnings rank 0 alone speaks."""
        # Asked at each record: a program may configure logging after the import.
        if not logging.getLogger().handlers and (record.levelno >= logging.WARNING or rank_and_size()[0] == 0):
            self.stream = sys.stderr  # as it is now: tests and notebooks replace it
            super().emit(record)


def show_progress() -> None:
    """Make the lines of this package visible unless the program has configured logging. As often as you like."""
    if logging.getLogger().handlers or any(isinstance(one, _Unconfigured) for one in _log.handlers):
        return
    handler = _Unconfigured()
    handler.setFormatter(logging.Formatter("%(asctime)s shardsmith: %(message)s", "%H:%M:%S"))
    _log.addHandler(handler)
    if _log.level == logging.NOTSET:
        word = os.environ.get(VERBOSITY, "info").upper()
        off = logging.CRITICAL + 1
        _log.setLevel(off if word == "OFF" else getattr(logging, word, logging.INFO))


class Stopwatch:
    """Times of one save: since it began, and of that how long the training waited."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._waited: float | None = None

    def released(self) -> None:
        """The training goes on."""
        self._waited = time.monotonic() - self._began

    def times(self) -> tuple[float, float]:
        """Seconds since it began, and of these how long the training waited: until ``released``, or until now."""
        seconds = time.monotonic() - self._began
        return seconds, seconds if self._waited is None else self._waited
