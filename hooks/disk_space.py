"""``low_disk``: what is done when little is free on the disk that a run saves to."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shardsmith.checking.arguments import checked
from shardsmith.checking.types import Size
from shardsmith.errors import UsageError
from shardsmith.ground.remote_path import RemotePath
from shardsmith.ground.sizes import parse_size, size_text
from shardsmith.manifest.retention import LowDisk, Retention

from .events import Event

if TYPE_CHECKING:
    from .hook import Hook

log = logging.getLogger(__name__)

_ORDER = ("thin_out", "warn", "stop")
"""What makes room comes before what complains of the lack of it."""


@checked
def low_disk(below: Size, then: Literal["warn", "thin_out", "stop"] = "warn") -> Retention:
    """Watch the free space of the disk: ``keep=latest(5) | low_disk("500GB", "thin_out") | low_disk("100GB", "stop")``.

    Rank 0 looks after each save, when retention has removed what it may; so ``below`` should be more than one save
    takes. Alone it keeps every checkpoint, as long as there is room.

    Args:
        below: Act when fewer bytes than these are free.
        then: ``"warn"`` in the log, and as an event of the kind ``low_disk``. ``"thin_out"`` removes checkpoints, the
            oldest first, until so much is free; those of ``multiples_of``, ``best`` and ``keep_if`` stay, and the
            newest; if that does not do, it warns. ``"stop"`` warns and ends the run as ``stop_on`` does: the step is
            saved, and ``hooks.should_stop`` turns true on all ranks.
    """
    return Retention(low_disks=frozenset([LowDisk(parse_size(below), then)]))


def refuse_without_disk(keep: Retention | None, directory: Path) -> None:
    """Raise UsageError if free space is to be looked at where there is none to see."""
    if keep is not None and keep.low_disks and isinstance(directory, RemotePath):
        raise UsageError(
            f"keep={keep!r}: {directory} is in an object store, whose free space cannot be seen; leave it out"
        )


def mind_disk(
    hook: Hook, keep: Retention | None, directory: Path, steps: Sequence[int], remove: Callable[[int], object]
) -> None:
    """Act on each ``low_disk`` of a policy. Rank 0, any thread, after the policy has removed what it may.

    Args:
        hook: Whose events and whose run it is.
        keep: The policy.
        directory: Where the steps are.
        steps: Those that are there.
        remove: Removes one of them.
    """
    rules = keep.low_disks if keep is not None else ()
    for rule in sorted(rules, key=lambda rule: _ORDER.index(rule.then)):
        assert keep is not None
        if rule.then == "thin_out":
            spared = keep.milestones(steps, directory)
            # The newest step always stays: it is the last of these, unless the policy spares it anyway.
            for step in sorted(set(steps) - spared)[: -1 if max(steps, default=None) not in spared else None]:
                # Asked before each removal: others write to that disk, too.
                if free_bytes(directory) >= rule.below:
                    break
                remove(step)
        if (free := free_bytes(directory)) < rule.below:
            _complain(hook, directory, max(steps, default=0), free, rule)


def free_bytes(directory: Path) -> int:
    """Bytes that this user can still write to the disk of a directory. Raises OSError."""
    # What is reserved for the administrator does not count as free.
    return shutil.disk_usage(directory).free


def _complain(hook: Hook, directory: Path, step: int, free: int, rule: LowDisk) -> None:
    text = f"{size_text(free)} free, which is less than {size_text(rule.below)}"
    log.warning("the disk of %s: %s%s", directory, text, "; the run ends" if rule.then == "stop" else "")
    hook.emit(Event(kind="low_disk", step=step, path=str(directory), nbytes=free, error=text))
    if rule.then == "stop":
        hook.request_stop()
