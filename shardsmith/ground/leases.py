"""Holding a checkpoint against retention while something reads it.

A reader has a shared ``flock`` on the checkpoint's ``metadata.json`` (of an export, on its ``shardsmith.json``), and
whoever removes it an exclusive one. The kernel drops a lock with its process, so a reader that was killed holds nothing
up. It is on the file, not on the directory: NFS and Lustre show locks of files to other hosts, those of directories
only to the same one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from shardsmith.errors import CheckpointNotFoundError
from shardsmith.ground.layout import METADATA_FILE, PROVENANCE_FILE
from shardsmith.ground.path_advice import not_there
from shardsmith.ground.remote_path import RemotePath


@contextlib.contextmanager
def hold(checkpoint: Path) -> Iterator[bool]:
    """Within it our retention leaves a checkpoint alone. Any number of readers may hold one at the same time.

    Yields whether it is held: False where there are no locks, and for what is not ours, which nobody of us removes.

    Raises:
        CheckpointNotFoundError: it is not there, or went before it could be held.
    """
    if isinstance(checkpoint, RemotePath):
        if not checkpoint.exists():
            raise CheckpointNotFoundError(checkpoint, "there is nothing of that name")
        yield False  # stores have no locks
        return
    with contextlib.ExitStack() as locks:
        held = _lock_shared(_mark_of(checkpoint), locks)
        # Only now: a retention that began before the lock was taken may have renamed the checkpoint meanwhile.
        if not checkpoint.exists():
            raise not_there(checkpoint)
        yield held


@contextlib.contextmanager
def unheld(checkpoint: Path) -> Iterator[bool]:
    """Within it nobody can begin to hold a checkpoint. False if somebody holds it already; True if nobody can tell."""
    if isinstance(checkpoint, RemotePath):
        yield True
        return
    with contextlib.ExitStack() as locks:
        descriptor = _open(_mark_of(checkpoint), os.O_RDWR, locks)  # NFS gives exclusive locks to writers only
        free = True
        if descriptor is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free = False
            except OSError:  # a file system without locks
                pass
        yield free


def _mark_of(checkpoint: Path) -> Path:
    """The file to lock."""
    # Whoever holds and whoever removes must lock the same file: the manifest counts where both are there.
    manifest, provenance = checkpoint / METADATA_FILE, checkpoint / PROVENANCE_FILE
    return provenance if provenance.is_file() and not manifest.is_file() else manifest


def _lock_shared(manifest: Path, locks: contextlib.ExitStack) -> bool:
    """Lock the file that has this name, also if another one got the name meanwhile."""
    while (descriptor := _open(manifest, os.O_RDONLY, locks)) is not None:
        # The lock is on the file that was opened. If the name leads to another one by now, this one is in the trash.
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits only while somebody renames the directory
            if os.path.samestat(os.fstat(descriptor), manifest.lstat()):
                return True
        except FileNotFoundError:  # renamed just now; whether there is a new one is seen by the next look
            continue
        except OSError:
            return False
    return False


def _open(path: Path, mode: int, opened: contextlib.ExitStack) -> int | None:
    """Open a file until the stack ends. None if that cannot be done: whoever reads the file will say why."""
    for flags in dict.fromkeys((mode, os.O_RDONLY)):
        # O_RDONLY after O_RDWR: a local disk also locks a file that this user may only read.
        with contextlib.suppress(OSError):
            # Without O_NONBLOCK the open of a FIFO of that name waits for a writer.
            descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            opened.callback(_close, descriptor)
            return descriptor
    return None


def _close(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process forked meanwhile, such as a data loader's, has it open too
    os.close(descriptor)
