"""A run of TorchTitan that ends before ``training.steps``, because its data ended.

Its trainer cancels the step that it has no data for, leaves its loop, and closes. It tells the checkpoint manager of no
last step, and saves nothing.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

from shardsmith.errors import RankError
from shardsmith.ground.ranks import Ranks

log = logging.getLogger(__name__)

_END_SECS = 60.0
"""How long a rank waits at the end of its data for the others, which take each step together with it."""
ERROR = "DataloaderExhaustedError"
"""What TorchTitan's ``train_step`` raises then, and its loop catches. By name: its module differs between trainers."""


class EndOfData:
    """Notices that a trainer runs out of data. Make it on all ranks at the same point."""

    def __init__(self, trainer: Any, has_last: bool) -> None:
        """No communication.

        Args:
            trainer: TorchTitan's.
            has_last: Whether anything is due at the last step.
        """
        self._trainer = trainer
        self._has_last = has_last
        self._ranks = Ranks(_END_SECS)
        self._has_come = False

    def has_no_step_left(self) -> bool:
        """Return whether all steps were made by a former run, so that TorchTitan makes none. No communication."""
        # What stands in for a trainer in a script of a user's own may have no such method, nor `train_step`.
        return not getattr(self._trainer, "should_continue_training", lambda: True)()

    def watch(self) -> None:
        """The training begins. No communication."""
        if self._has_last and hasattr(self._trainer, "train_step"):
            self._trainer.train_step = self._noticing(self._trainer.train_step)

    def last_step(self) -> int | None:
        """Return the last step, if the data has ended the run on all ranks after it; else None.

        All ranks, when the trainer has left its loop; communicates on ranks whose data has ended.
        """
        # With an error under way other ranks may not come.
        if not self._has_come or sys.exc_info()[0] is not None:
            return None
        canceled: int = self._trainer.step  # it is counted already
        try:
            self._ranks.gather("ending at the end of the data", lambda: None)
        except RankError as error:
            log.warning("the data of this rank ended before step %d, and that of others did not: %s", canceled, error)
            return None
        if canceled <= 1:
            log.warning("there was no data for step 1: nothing is exported")
            return None
        log.warning("the data ended before step %d: step %d is the last one", canceled, canceled - 1)
        return canceled - 1

    def _noticing(self, train_step: Any) -> Any:
        @functools.wraps(train_step)
        def noticing(*args: Any, **kwargs: Any) -> Any:
            try:
                return train_step(*args, **kwargs)
            except Exception as error:
                self._has_come = type(error).__name__ == ERROR
                raise

        return noticing
