"""A file mapped read-only into memory, handed out as torch views.

Nothing is read until a view is touched, and pages that were touched can be dropped by the kernel at any time, so a map
of any size costs address space only.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import warnings
from pathlib import Path

import torch
from torch import Tensor

from shardsmith.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    IncompleteCheckpointError,
    UnsafeCheckpointError,
    UsageError,
)

# Without O_NONBLOCK the open of a FIFO waits for a writer, for ever.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY

with warnings.catch_warnings():
    # torch warns once per process about read-only buffers. Ours are read-only on purpose: say it here, to nobody.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


_Bytes = bytes  # the class below has a method of that name


class MappedFile:
    """A regular file of which byte ranges can be viewed as tensors. Thread-safe.

    Never write to a view: the pages are mapped read-only, and a write ends the process. So does reading a page that
    somebody else cut off the file after it was mapped; files of a complete checkpoint do not change.

    Attributes:
        path: The file.
        size: Its size in bytes when it was mapped. May be 0.
    """

    def __init__(self, path: str | Path, *, follow_links: bool = False) -> None:
        """Map a file.

        Args:
            path: A regular file.
            follow_links: Accept a symbolic link as the last part of the path, as in a Hugging Face cache.

        Raises:
            CheckpointNotFoundError: when there is no such file.
            UnsafeCheckpointError: for a link, a FIFO, a device or a directory.
            CheckpointError: when it cannot be opened.
        """
        self.path = Path(path)
        descriptor = _open(self.path, follow_links)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise UnsafeCheckpointError(self.path, "is not a regular file; it was not read")
            self.size = status.st_size
            self._map: mmap.mmap | _Bytes | None = _map(self.path, descriptor, self.size)
        finally:
            os.close(descriptor)

    def tensor(self, offset: int, nbytes: int) -> Tensor:
        """A uint8 view (``nbytes``,) of a byte range.

        Raises:
            IncompleteCheckpointError: when the range does not lie inside the file.
        """
        return self.view(offset, nbytes, torch.uint8)

    def view(self, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
        """A 1-D view (``numel``,) of the elements that begin at byte ``offset``, which need not be aligned.

        Raises:
            IncompleteCheckpointError: when the range does not lie inside the file.
        """
        source = self._checked(offset, numel * dtype.itemsize)
        if numel == 0:
            return torch.empty(0, dtype=dtype, device="cpu")
        # CPUs load words of up to 8 bytes from any address; 16-byte ones are moved with instructions that trap.
        if dtype.itemsize > 8 and offset % dtype.itemsize:
            return torch.frombuffer(bytearray(source[offset : offset + numel * dtype.itemsize]), dtype=dtype)
        return torch.frombuffer(source, dtype=dtype, count=numel, offset=offset)

    def bytes(self, offset: int, length: int) -> _Bytes:
        """A copy of a byte range.

        Raises:
            IncompleteCheckpointError: when the range does not lie inside the file.
        """
        return self._checked(offset, length)[offset : offset + length]

    def close(self) -> None:
        """Let go of the file. Views stay valid: the map goes away with the last of them. A second call does nothing."""
        self._map = None

    def _checked(self, offset: int, length: int) -> mmap.mmap | _Bytes:
        """The map, once the range is known to lie inside it."""
        source = self._map
        if source is None:
            raise UsageError(f"{self.path}: was closed; open it again to read from it")
        if offset < 0 or length < 0 or offset + length > self.size:
            wanted = f"bytes {offset} to {offset + length} were asked for"
            raise IncompleteCheckpointError(self.path, f"{wanted}, but the file ends at {self.size}; it is truncated")
        return source


def _open(path: Path, follow_links: bool) -> int:
    try:
        return os.open(path, _FLAGS if follow_links else _FLAGS | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFoundError(path, "no such file") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafeCheckpointError(
                path, "is a symbolic link; it was not followed. Copy the file itself"
            ) from error
        raise CheckpointError(path, f"cannot be opened: {error.strerror}") from error
    except ValueError as error:  # a NUL byte in the name
        raise UnsafeCheckpointError(repr(path), f"is no file name: {error}") from error


def _map(path: Path, descriptor: int, size: int) -> mmap.mmap | bytes:
    if size == 0:  # which mmap refuses
        return b""
    try:
        # ACCESS_READ and not ACCESS_COPY: a private writable map counts against the limit of committed memory.
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(path, f"cannot be mapped into memory: {error}") from error
