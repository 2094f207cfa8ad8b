"""What becomes of exports that have ended: they are announced and pushed; what failed is raised, if that is wanted."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .background import attempted, logged
from .in_flight import InFlight, Running
from .options import ExportWriting
from .push import Pushes

log = logging.getLogger(__name__)


class ExportResults:
    """The results of one hook's exports, on this rank. No communication."""

    def __init__(self, in_flight: InFlight, pushes: Pushes, writing: ExportWriting) -> None:
        """Begin with none.

        Args:
            in_flight: The exports.
            pushes: Takes them to the Hub.
            writing: What to do with an export that has ended, and if one has failed, or its push.
        """
        self._in_flight = in_flight
        self._pushes = pushes
        self._writing = writing
        self._raises_push_errors = writing.on_push_error == "raise"
        self._failures: list[BaseException] = []  # not yet raised

    def announce(self) -> None:
        """Call ``on_exported`` for exports that have ended well, and keep what failed in the others."""
        for one in self._in_flight.take_ended():
            error = one.future.exception()
            if error is not None:
                self._failures.append(error)
            elif (on_exported := self._writing.on_exported) is not None:
                # The first directory; an average in one of its own comes second.
                _, error = attempted(partial(on_exported, one.step, one.future.result()[0]))
                self._note_callback_error(one, error)

    def raise_first(self) -> None:
        """Raise the first failure, if that is wanted; those after it are in the log, as all are."""
        # Taken out also where nothing is raised: the log has them.
        errors, self._failures = self._failures, []
        if errors and self._writing.on_error == "raise":
            raise errors[0]

    def push(self, step: int, exports: Sequence[Path]) -> None:
        """Push the directories of a step to the Hub, if that is wanted. Rank 0, in the background."""
        self._pushes.start(step, exports, partial(self._note_push_error, step))

    def resume_pushes(self, step: int) -> None:
        """Push what a former run was to push, and has not. Rank 0; raises nothing."""
        with logged("looking for exports that are still to be pushed"):
            self._pushes.resume(partial(self._note_push_error, step))

    def _note_callback_error(self, one: Running, error: BaseException | None) -> None:
        """``on_exported`` has raised: the export stands, and all ranks raise after the same step."""
        if error is not None:
            log.error("on_exported of step %s failed; the export is there", one.step, exc_info=error)
            self._failures.append(error)
            # It may have done well on the other ranks: they are told, so that all raise.
            self._in_flight.background.report(one.future, f"on_exported of step {one.step}: {error}")

    def _note_push_error(self, step: int, error: Exception) -> None:
        """A push has failed, as the log says: the export stands. Any thread of rank 0."""
        if self._raises_push_errors:
            self._failures.append(error)
            self._in_flight.background.report(None, f"push of step {step}: {error}")
