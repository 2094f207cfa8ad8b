"""A file of which byte ranges are handed out as torch tensors: read by ``pread``, or, within a command, mapped.

A page of a map that cannot be read, since the file was cut off or its disk fails, ends the process by SIGBUS. That must
not happen to a process that trains, so there everything is read by ``pread``, and what cannot be read is an error of
ours. A command may end; it maps files (``reading_by_maps``), which copies nothing and costs address space only.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from shardsmith.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    IncompleteCheckpointError,
    UnsafeCheckpointError,
    UsageError,
)
from shardsmith.ground.maps import reads_by_maps
from shardsmith.ground.memory import writable_memory_of
from shardsmith.ground.open_file import OpenFile, open_file
from shardsmith.ground.remote_path import RemotePath, as_path

# Without O_NONBLOCK the open of a FIFO waits for a writer, for ever.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY

with warnings.catch_warnings():
    # torch warns once per process about read-only buffers. Ours are read-only on purpose: say it here, to nobody.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


_Bytes = bytes  # the class below has a method of that name


class MappedFile:
    """A regular file of which byte ranges can be had as tensors. Thread-safe.

    Never write to such a tensor: its pages may be mapped read-only, and a write ends the process then.

    Attributes:
        path: The file.
        size: Its size in bytes when it was opened. May be 0.
        is_mapped: Whether tensors are views on a map, rather than copies.
    """

    def __init__(self, path: str | Path, *, follow_links: bool = False) -> None:
        """Open a file, and map it within ``reading_by_maps``.

        Args:
            path: A regular file.
            follow_links: Accept a symbolic link as the last part of the path, as in a Hugging Face cache.

        Raises:
            CheckpointNotFoundError: when there is no such file.
            UnsafeCheckpointError: for a link, a FIFO, a device or a directory.
            CheckpointError: when it cannot be opened.
        """
        self.path = as_path(path)
        self._source: mmap.mmap | _Bytes | _Descriptor | OpenFile | None
        if isinstance(self.path, RemotePath):
            self.is_mapped = False
            self._source = _open_remote(self.path)
            self.size = self._source.size
            return
        self.is_mapped = reads_by_maps()
        descriptor = _Descriptor(_open(self.path, follow_links))
        status = os.fstat(descriptor.number)
        if not stat.S_ISREG(status.st_mode):
            raise UnsafeCheckpointError(self.path, "is not a regular file; it was not read")
        self.size = status.st_size
        self._source = _map(self.path, descriptor.number, self.size) if self.is_mapped else descriptor

    @classmethod
    def of_descriptor(cls, path: Path, descriptor: int) -> Self:
        """Read a regular file that the caller has open, and may close. It is not mapped."""
        file = cls.__new__(cls)
        file.path, file.is_mapped = path, False
        file.size = os.fstat(descriptor).st_size
        file._source = _Descriptor(os.dup(descriptor))
        return file

    def tensor(self, offset: int, nbytes: int) -> Tensor:
        """Return a uint8 tensor (``nbytes``,) of a byte range, as ``view`` gives it.

        Raises:
            IncompleteCheckpointError: when the range does not lie inside the file.
        """
        return self.view(offset, nbytes, torch.uint8)

    def view(self, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
        """Return a 1-D tensor (``numel``,) of the elements that begin at byte ``offset``, which need not be aligned.

        A view on the file if it is mapped, else a copy.

        Raises:
            IncompleteCheckpointError: when the range does not lie inside the file.
            CheckpointError: when it cannot be read.
        """
        source = self._checked(offset, numel * dtype.itemsize)
        if numel == 0:
            return torch.empty(0, dtype=dtype, device="cpu")
        # `bytes` stands for the map of an empty file.
        if not isinstance(source, mmap.mmap | _Bytes):
            values = torch.empty(numel, dtype=dtype, device="cpu")
            self._fill(source, offset, writable_memory_of(values))
            return values
        # CPUs load words of up to 8 bytes from any address; 16-byte ones are moved with instructions that trap.
        if dtype.itemsize > 8 and offset % dtype.itemsize:
            return torch.frombuffer(bytearray(source[offset : offset + numel * dtype.itemsize]), dtype=dtype)
        return torch.frombuffer(source, dtype=dtype, count=numel, offset=offset)

    def bytes(self, offset: int, length: int) -> _Bytes:
        """Return a copy of a byte range. Raises as ``view``."""
        source = self._checked(offset, length)
        if isinstance(source, mmap.mmap | _Bytes):
            return source[offset : offset + length]
        data = bytearray(length)
        self._fill(source, offset, memoryview(data))
        return _Bytes(data)

    def read_into(self, offset: int, memory: memoryview) -> None:
        """Copy a byte range into memory of the same length. Raises as ``view``."""
        source = self._checked(offset, len(memory))
        if isinstance(source, mmap.mmap | _Bytes):
            memory[:] = source[offset : offset + len(memory)]
        else:
            self._fill(source, offset, memory)

    def close(self) -> None:
        """Let go of the file. Tensors stay valid: a map goes away with the last of them. Any number of calls."""
        self._source = None

    def _fill(self, file: _Descriptor | OpenFile, offset: int, memory: memoryview) -> None:
        while memory:
            # `preadv` may give less than was asked for: after a signal, near the end, and above 2 GiB at once.
            try:
                count = file.read_at(memory, offset)
            except OSError as error:
                raise CheckpointError(self.path, f"cannot be read at byte {offset}: {error.strerror}") from error
            if count == 0:
                raise IncompleteCheckpointError(
                    self.path, f"ends at byte {offset} and had {self.size} when it was opened: it was cut off meanwhile"
                )
            memory, offset = memory[count:], offset + count

    def _checked(self, offset: int, length: int) -> mmap.mmap | _Bytes | _Descriptor | OpenFile:
        """What to read from, once the range is known to lie inside it."""
        # One look: if another thread closes the file meanwhile, this read still ends.
        source = self._source
        if source is None:
            raise UsageError(f"{self.path}: was closed; open it again to read from it")
        if offset < 0 or length < 0 or offset + length > self.size:
            wanted = f"bytes {offset} to {offset + length} were asked for"
            raise IncompleteCheckpointError(self.path, f"{wanted}, but the file ends at {self.size}; it is truncated")
        return source


class _Descriptor:
    """An open file, closed when nobody uses it any more: a thread may be reading while another one closes."""

    def __init__(self, number: int) -> None:
        self.number = number

    def read_at(self, memory: memoryview, offset: int) -> int:
        """Fill the beginning of ``memory``; how much."""
        return os.preadv(self.number, [memory], offset)

    # `os.close` is bound here: at the end of the interpreter the module may be gone before the last file.
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.number)


def _open_remote(path: RemotePath) -> OpenFile:
    try:
        return open_file(path)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(path, "no such file") from error


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
