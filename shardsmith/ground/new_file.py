"""Files that are written front to back, on a disk or in an object store: ``new_file`` gives either."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Protocol

from shardsmith.ground.object_store import PART_BYTES
from shardsmith.ground.remote_path import RemotePath


class NewFile(Protocol):
    """A file that is being made. One thread writes; ``sync`` may be called by another meanwhile."""

    def write(self, memory: memoryview) -> None:
        """Go on with these bytes, all of them. Raises OSError, StorageError."""

    def sync(self) -> None:
        """Have what was written so far on its way, where that helps. Raises OSError."""

    def finish(self) -> None:
        """Make the file complete and durable. Raises OSError, StorageError."""

    def close(self) -> None:
        """Let go of it. In a store nothing is left of a file that was not finished. Any number of calls."""


def new_file(path: Path, expected_bytes: int = 0) -> NewFile:
    """Make a file by the kind of its path.

    Args:
        path: Where; on a disk there must be nothing.
        expected_bytes: About how many will be written.

    Raises:
        OSError: it cannot be made.
        StorageError: its store cannot be reached.
    """
    return _Upload(path, expected_bytes) if isinstance(path, RemotePath) else _LocalFile(path)


class _LocalFile:
    def __init__(self, path: Path) -> None:
        # Never write through something that has the name already, a link included.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor: int | None = os.open(path, flags, 0o666)

    def write(self, memory: memoryview) -> None:
        # `os.write` may take less than all: on Linux 2 GiB at most.
        while memory:
            memory = memory[os.write(self._number(), memory) :]

    def sync(self) -> None:
        os.fsync(self._number())

    def finish(self) -> None:
        # The entry in the directory is made durable by the commit.
        os.fsync(self._number())

    def close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def _number(self) -> int:
        if self._descriptor is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._descriptor


class _Upload:
    """An upload in parts, several at the same time."""

    def __init__(self, path: RemotePath, expected_bytes: int) -> None:
        located = path.located
        self._store, self._key = located.store, located.key
        with self._store.writing(self._key):
            self._writer = self._store.writer(self._key, expected_bytes)

    def write(self, memory: memoryview) -> None:
        with self._store.writing(self._key):
            for at in range(0, len(memory), PART_BYTES):
                # A copy: the client refers to what it is given until it is sent, long after this returns.
                self._writer.write(bytes(memory[at : at + PART_BYTES]))

    def sync(self) -> None:
        """Parts go off by themselves."""

    def finish(self) -> None:
        with self._store.writing(self._key):
            self._writer.close()

    def close(self) -> None:
        with contextlib.suppress(Exception):  # an upload that is given up
            # With an exception `__exit__` gives the upload up; `close` would complete the object.
            if not self._writer.closed():
                self._writer.__exit__(OSError, None, None)
