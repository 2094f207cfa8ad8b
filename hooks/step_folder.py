"""What becomes of the steps of a run directory after one was saved: the link to the newest, and retention."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from shardsmith.ground.commit import place_link, remove, sweep
from shardsmith.ground.layout import LATEST_LINK, step_name
from shardsmith.manifest.checkpoints import committed_steps

from .background import logged
from .events import Event
from .retention import Retention, steps_to_remove

log = logging.getLogger(__name__)


class StepFolder:
    """The steps of one run. Rank 0 calls it; nothing here raises, for the checkpoint is saved all the same."""

    def __init__(self, directory: Path, keep: Retention | None, *, latest_link: bool) -> None:
        """``latest_link``: keep a link to the newest step."""
        self._directory = directory
        self._keep = keep
        self._link = directory / LATEST_LINK if latest_link else None

    def point_to(self, step: int) -> None:
        """Let the link, if there is to be one, lead to a step."""
        if self._link is not None:
            with logged(f"making {self._link}"):
                place_link(self._link, step_name(step))

    def remove_old(self, emit: Callable[[Event], None]) -> None:
        """Remove what dead attempts left, and what is not retained. What fails now, the next save tries again."""
        with logged(f"{self._directory}: looking for old checkpoints to remove"):
            sweep(self._directory)
            for step in steps_to_remove(self._keep, committed_steps(self._directory), directory=self._directory):
                path = self._directory / step_name(step)
                with logged(f"removing {path.name}"):
                    if remove(path):
                        emit(Event(kind="remove", step=step, path=str(path)))
                    else:
                        log.info("%s is being read; a later save removes it", path)
