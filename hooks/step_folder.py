"""What becomes of the steps of a folder after one was saved or exported: the link to the newest, and retention."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

from shardsmith.errors import StorageError, WriteError
from shardsmith.ground.commit import check_writable, place_link, remove, sweep
from shardsmith.ground.layout import LATEST_LINK, METADATA_FILE, step_name
from shardsmith.manifest.checkpoints import committed_steps, refuse_within_step, set_aside_unfinished
from shardsmith.manifest.retention import Retention, steps_to_remove
from shardsmith.manifest.retention_note import note_policy

from .background import logged
from .disk_space import mind_disk, refuse_without_disk
from .events import Event
from .hook import Hook

log = logging.getLogger(__name__)


class StepFolder:
    """The steps of one folder. Rank 0 calls it; nothing here raises, for the step is there all the same."""

    def __init__(
        self,
        directory: Path,
        keep: Retention | None,
        *,
        latest_link: bool = False,
        marker: str = METADATA_FILE,
        suffixes: Sequence[str] = ("",),
    ) -> None:
        """Remember what is to be done.

        Args:
            directory: The folder.
            keep: Which steps stay; None keeps all.
            latest_link: Keep a link to the newest step.
            marker: The file that every complete step has.
            suffixes: A step consists of these directories: its name with each of them.

        Raises:
            UsageError: the policy looks at a disk, and there is none.
        """
        refuse_without_disk(keep, directory)
        self._directory = directory
        self._keep = keep
        self._marker = marker
        self._suffixes = tuple(suffixes)
        self._link = directory / LATEST_LINK if latest_link else None
        self._has_note = False

    def point_to(self, step: int) -> None:
        """Let the link, if there is to be one, lead to a step."""
        if self._link is not None:
            with logged(f"making {self._link}"):
                place_link(self._link, step_name(step))

    def note_policy(self) -> None:
        """Write down beside the steps, once, which of them are kept, for those who want to know what goes next."""
        if not self._has_note:
            with logged(f"writing down what is kept in {self._directory}"):
                self._has_note = note_policy(self._directory, self._keep, self._marker)

    def follow(self, hook: Hook, step: int) -> None:
        """A step was saved: point to it, then remove what may go."""
        self.point_to(step)
        self.remove_old(hook)

    def remove_old(self, hook: Hook, spare: Collection[int] = ()) -> None:
        """Remove what dead attempts left, and what is not retained. What fails now, the next save tries again.

        Args:
            hook: Whose steps these are.
            spare: Steps that something still reads.
        """
        self.note_policy()
        with logged(f"{self._directory}: looking for old steps to remove"):
            sweep(self._directory)
            there = committed_steps(self._directory, self._marker)
            going = steps_to_remove(self._keep, there, spare, self._directory)
            for step in going:
                self._remove(hook, step)
            # What is spared is still read: low_disk must not remove it either.
            left = sorted(set(there).difference(going, spare))
            mind_disk(hook, self._keep, self._directory, left, partial(self._remove, hook))

    def _remove(self, hook: Hook, step: int) -> None:
        paths = [self._directory / (step_name(step) + suffix) for suffix in self._suffixes]
        for path in [path for path in paths if path.is_dir()]:
            with logged(f"removing {path.name}"):
                if remove(path):
                    hook.emit(Event(kind="remove", step=step, path=str(path)))
                else:
                    log.info("%s is being read; it is removed later", path)


def prepare(directory: Path, is_leader: bool, *, may_be_away: bool = False) -> None:
    """Make sure that steps can be saved in a directory, and remove what dead attempts left there.

    Args:
        directory: The directory.
        is_leader: Whether this rank does so; the others do nothing.
        may_be_away: A store that cannot be reached now is no error: steps are kept on local disks meanwhile.

    Raises:
        UsageError: it is in the directory of a step.
        WriteError: it cannot be written to.
    """
    if not is_leader:
        return
    refuse_within_step(directory)
    try:
        check_writable(directory)
        sweep(directory)
    except (StorageError, WriteError) as error:
        # `check_writable` turns the store's error into a WriteError.
        cause = error.__cause__ if isinstance(error, WriteError) else error
        if not (may_be_away and isinstance(cause, StorageError) and cause.transient):
            raise
        log.warning("%s cannot be reached now: %s", directory, cause)


def leave_unfinished(directory: Path, resumed: int) -> None:
    """Set aside what is no checkpoint of the steps after the one that a run goes on from. Rank 0."""
    for aside, reason in set_aside_unfinished(directory, resumed).items():
        log.warning("%s was set aside: its step is after the one resumed, and it %s", aside, reason)
