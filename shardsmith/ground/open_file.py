"""Files that are read by ranges, on a disk or in an object store: ``open_file`` gives either."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from shardsmith.ground.object_store import PART_BYTES
from shardsmith.ground.remote_path import RemotePath

# Without O_NONBLOCK the open of a FIFO waits for a writer, for ever.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_AHEAD = 4
"""Ranged reads of one file that are under way at the same time."""
# A smaller read takes the whole block around it, and a smaller gap between two ranges is read with them.
_SMALL_BYTES = 64 << 10
_BLOCK_BYTES = 1 << 20
"""What is asked for instead of a small range: others beside it mostly follow."""
_BLOCKS = 8


class OpenFile(Protocol):
    """A regular file that is open for reading.

    Attributes:
        size: Its size in bytes when it was opened.
    """

    size: int

    def read_at(self, memory: memoryview, offset: int) -> int:
        """Fill the beginning of ``memory`` from a byte on; how much, 0 at the end. Raises OSError, StorageError."""

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Say which ranges will be read, in ascending order, so that they can be fetched ahead."""

    def close(self) -> None:
        """Close it. Any number of calls."""


def open_file(path: Path, *, follow_links: bool = False) -> OpenFile:
    """Open a file by the kind of its path.

    Args:
        path: A file of this machine, or one in an object store.
        follow_links: Accept a symbolic link as the last part of the path.

    Raises:
        OSError: there is none, or it is a link; ``errno`` 0 for what is no regular file.
        StorageError: its store cannot be reached.
    """
    return _RemoteFile(path) if isinstance(path, RemotePath) else _LocalFile(path, follow_links)


class _LocalFile:
    def __init__(self, path: Path, follow_links: bool) -> None:
        self._descriptor: int | None = os.open(path, _FLAGS if follow_links else _FLAGS | os.O_NOFOLLOW)
        # The status of what was opened, not of the path: nobody can exchange it meanwhile.
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise OSError(0, "is not a regular file")
        self.size = status.st_size

    def read_at(self, memory: memoryview, offset: int) -> int:
        if self._descriptor is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return os.preadv(self._descriptor, [memory], offset)

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """The system reads ahead by itself."""

    def close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)


class _RemoteFile:
    """Reads what is asked for, and what is expected ahead of it, in ranges of at most ``PART_BYTES``."""

    def __init__(self, path: RemotePath) -> None:
        located = path.located
        self._store, self._key = located.store, located.key
        self.size = self._store.head(self._key).size
        # Guards `_blocks` alone: what `expect` has fetched is for one reader.
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, memoryview] = OrderedDict()
        self._expected: list[tuple[int, int]] = []
        self._fetched: OrderedDict[tuple[int, int], Future[memoryview]] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._expected = [part for one in _joined(ranges, self.size) for part in _parts(*one)]
        if self._expected:
            self._pool = self._pool or ThreadPoolExecutor(_AHEAD, "shardsmith-ranges")
            self._fetch_ahead()

    def read_at(self, memory: memoryview, offset: int) -> int:
        wanted = min(len(memory), self.size - offset)
        if wanted <= 0:
            return 0
        start, data = self._range_at(offset, wanted)
        count = min(wanted, start + len(data) - offset)
        memory[:count] = data[offset - start : offset - start + count]
        return count

    def _range_at(self, offset: int, nbytes: int) -> tuple[int, memoryview]:
        """Bytes of the file that begin at or before ``offset``, and where; at least one from there on."""
        # What ends before the offset was read or passed over; its place goes to the next range.
        while self._fetched and next(iter(self._fetched))[1] <= offset:
            self._fetched.popitem(last=False)
            self._fetch_ahead()
        for (start, end), fetched in self._fetched.items():
            if start <= offset < end:
                return start, fetched.result()
        if nbytes > _SMALL_BYTES:
            return offset, self._store.range(self._key, offset, offset + min(nbytes, PART_BYTES))
        return self._block_at(offset)

    def _block_at(self, offset: int) -> tuple[int, memoryview]:
        start = offset // _BLOCK_BYTES * _BLOCK_BYTES
        # Held during the request: threads that want the same block ask the store once.
        with self._lock:
            if (block := self._blocks.get(start)) is None:
                block = self._store.range(self._key, start, min(start + _BLOCK_BYTES, self.size))
                self._blocks[start] = block
                if len(self._blocks) > _BLOCKS:
                    self._blocks.popitem(last=False)
            return start, block

    def _fetch_ahead(self) -> None:
        while self._pool is not None and self._expected and len(self._fetched) < _AHEAD:
            start, end = self._expected.pop(0)
            self._fetched[start, end] = self._pool.submit(self._store.range, self._key, start, end)

    def close(self) -> None:
        # First, so that a reader in another thread submits nothing to a pool that was shut down.
        self._expected = []
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._fetched.clear()


def _joined(ranges: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Ranges without those between them that cost less than another request."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted((start, min(end, size)) for start, end in ranges if start < min(end, size)):
        if joined and start - joined[-1][1] <= _SMALL_BYTES:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def _parts(start: int, end: int) -> list[tuple[int, int]]:
    return [(at, min(at + PART_BYTES, end)) for at in range(start, end, PART_BYTES)]
