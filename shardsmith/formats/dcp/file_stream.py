"""A file that is read once, front to back: what is wanted of it is taken as it passes by, and all of it is hashed.

It is read and not mapped, because a disk that cannot read a mapped page ends the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
import xxhash
from torch import Tensor

from shardsmith.ground.open_file import open_file

BLOCK_BYTES = 1 << 20
"""The most that can be taken at once: small enough to stay in cache from the read to the hash and the copy."""


class FileStream:
    """A regular file, of which ranges are taken in ascending order.

    Attributes:
        path: The file.
        size: Its size in bytes when it was opened.
    """

    def __init__(
        self, path: Path, *, hashed: bool, follow_links: bool = False, ranges: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Open it.

        Args:
            path: The file.
            hashed: Read all of it, also what lies between the ranges, and hash it.
            follow_links: Accept a symbolic link.
            ranges: What will be taken, if it is not hashed, so that it can be fetched ahead.

        Raises:
            OSError: there is none, or no regular one.
            StorageError: its store cannot be reached.
        """
        self.path = path
        self._file = open_file(path, follow_links=follow_links)
        self.size = self._file.size
        # From an object store the ranges are requested ahead of the reads; a local disk needs no hint.
        self._file.expect([(0, self.size)] if hashed else ranges)
        self._hash = xxhash.xxh3_128() if hashed else None
        self._block = memoryview(bytearray(BLOCK_BYTES))
        self._begin = self._end = 0  # of what is in the block

    def take(self, offset: int, nbytes: int) -> memoryview:
        """Return the bytes of a range of at most ``BLOCK_BYTES``, valid until the next call. Raises OSError."""
        if offset < self._begin:
            raise OSError(0, f"is not laid out in order at byte {offset}")
        if offset + nbytes > self._end:
            self._advance(offset, nbytes)
        first = offset - self._begin
        return self._block[first : first + nbytes]

    def take_values(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """Return, as ``take``, the elements (``count``,) that begin there, aligned or not."""
        memory = self.take(offset, count * dtype.itemsize)
        if dtype.itemsize > 8:  # processors move those with instructions that need them aligned
            return torch.frombuffer(bytearray(memory), dtype=dtype)
        return torch.frombuffer(memory, dtype=dtype)

    def finish(self) -> str:
        """Read what is left, if it is hashed; return the XXH3-128 of the file, or "" without one. Raises OSError."""
        if self._hash is None:
            return ""
        while self._end < self.size:
            self._advance(self._end, min(BLOCK_BYTES, self.size - self._end))
        return self._hash.hexdigest()

    def _advance(self, offset: int, nbytes: int) -> None:
        """Have a range in the block: what it holds of it already stays."""
        # With a hash what lies before the range is read, too; without one it is jumped over.
        while self._hash is not None and self._end < offset:
            self._begin = self._end
            self._fill(0, min(BLOCK_BYTES, self.size - self._end))
        # What of the range was read already moves to the front of the block: it is not hashed a second time.
        kept = max(0, self._end - offset)
        self._block[:kept] = self._block[self._end - self._begin - kept : self._end - self._begin]
        # _fill reads from _end on, so _end is set before.
        self._begin, self._end = offset, offset + kept
        # With a hash the block is filled up, since all of the file is read anyway; without one only what is wanted.
        self._fill(kept, nbytes - kept if self._hash is None else min(BLOCK_BYTES - kept, self.size - self._end))
        if self._end < offset + nbytes:
            raise OSError(0, f"ends at byte {self._end}")

    def _fill(self, at: int, nbytes: int) -> None:
        """Read on, to a place in the block. Stops where the file ends."""
        while nbytes > 0:
            memory = self._block[at : at + nbytes]
            count = self._file.read_at(memory, self._end)
            if count == 0:
                raise OSError(0, f"ends at byte {self._end}")
            if self._hash is not None:
                self._hash.update(memory[:count])
            at, nbytes, self._end = at + count, nbytes - count, self._end + count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
