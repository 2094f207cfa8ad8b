"""One tensor in a ``torch.save`` archive that is a byte range of a mapped file, as a view on that file.

Such an archive is a zip whose members are stored, not compressed: ``<root>/data.pkl`` says how the tensor lies in
``<root>/data/<key>``, which is its plain bytes. Only the directory at the end of the zip is read, by hand: ``zipfile``
takes ten times as long, and there are thousands of archives in a checkpoint.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from shardsmith.errors import CorruptCheckpointError, UnsafeCheckpointError
from shardsmith.mapped import MappedFile
from shardsmith.tensor_pickle import MAX_TENSOR_PICKLE_BYTES, TensorRecord, read_tensor_pickle

_END = struct.Struct("<4s4H2IH")  # the last 22 bytes of a zip without a comment
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_MAX_ENTRIES = 64
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # "look for the number in the zip64 record"


class _UnusualError(ValueError):
    """Not laid out as ``torch.save`` lays out a single tensor."""


def read_archived_tensor(file: MappedFile, offset: int, length: int) -> Tensor:
    """The tensor in an archive: a read-only view on the file, or a copy where torch has to unpack it.

    Args:
        offset: Where the archive begins in the file, in bytes.
        length: Its length in bytes.

    Returns:
        A CPU tensor with the shape and strides that were saved. Its data need not be aligned. Never write to it.

    Raises:
        IncompleteCheckpointError: when the file ends before the archive does.
        CorruptCheckpointError: when it is no archive of one tensor.
        UnsafeCheckpointError: when it asks for code to be run.
    """
    view = _view(file, offset, length)
    return _unpacked(file, offset, length) if view is None else view


def _view(file: MappedFile, offset: int, length: int) -> Tensor | None:
    """The tensor as a view, or None when the archive is not of the usual kind."""
    try:
        archive = _Archive(file, offset, length)
        record = archive.record()
        start = archive.payload(record)
    except (_UnusualError, struct.error, UnicodeDecodeError):
        return None
    flat = file.view(offset + start + record.offset * record.dtype.itemsize, record.span, record.dtype)
    return flat.as_strided(record.size, record.stride)


class _Archive:
    """The members of a zip that is ``length`` bytes of a mapped file, by their name below the root folder."""

    def __init__(self, file: MappedFile, offset: int, length: int) -> None:
        self.file = file
        self.offset = offset
        self.length = length
        count, size, start = self._directory()
        self.members = dict(_entries(self._bytes(start, size), count))

    def record(self) -> TensorRecord:
        """What the archive says about its tensor."""
        record = read_tensor_pickle(self._content("data.pkl", MAX_TENSOR_PICKLE_BYTES))
        # torch < 2.1 did not write the byte order; it could only be the machine's own.
        order = self._content("byteorder", 6) if "byteorder" in self.members else b"little"
        if record is None or order != b"little" or sys.byteorder != "little":
            raise _UnusualError
        return record

    def payload(self, record: TensorRecord) -> int:
        """Where the bytes of the tensor's storage begin, from the start of the archive."""
        if record.storage_nbytes == 0:
            return 0
        start, nbytes = self._locate(f"data/{record.storage}")
        if nbytes != record.storage_nbytes:
            raise _UnusualError
        return start

    def _content(self, name: str, max_bytes: int) -> bytes:
        start, nbytes = self._locate(name)
        if nbytes > max_bytes:
            raise _UnusualError
        return self._bytes(start, nbytes)

    def _locate(self, name: str) -> tuple[int, int]:
        """Start and length of a member. The local header has padding of its own in front of the bytes."""
        if name not in self.members:
            raise _UnusualError
        header, nbytes = self.members[name]
        fields = _LOCAL.unpack(self._bytes(header, _LOCAL.size))
        start = header + _LOCAL.size + fields[9] + fields[10]
        if fields[0] != b"PK\3\4" or start + nbytes > self.length:
            raise _UnusualError
        return start, nbytes

    def _directory(self) -> tuple[int, int, int]:
        """Number of entries, length and start of the central directory."""
        end = self.length - _END.size
        signature, *_, count, size, start, comment = _END.unpack(self._bytes(end, _END.size))
        if signature != b"PK\5\6" or comment:
            raise _UnusualError
        if count == _FULL16 or size == _FULL32 or start == _FULL32:
            _, _, end64, _ = _END64_LOCATOR.unpack(self._bytes(end - _END64_LOCATOR.size, _END64_LOCATOR.size))
            signature, *_, count, size, start = _END64.unpack(self._bytes(end64, _END64.size))
            if signature != b"PK\6\6":
                raise _UnusualError
        if count > _MAX_ENTRIES:
            raise _UnusualError
        return count, size, start

    def _bytes(self, start: int, nbytes: int) -> bytes:
        """A range of the archive. Numbers out of it come from strangers."""
        if start < 0 or start + nbytes > self.length:
            raise _UnusualError
        return self.file.bytes(self.offset + start, nbytes)


def _entries(directory: bytes, count: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name below the root folder, start of the local header, and length of each member. None may be compressed."""
    position = 0
    root = ""
    for _ in range(count):
        fields = _ENTRY.unpack_from(directory, position)
        flags, method, packed, nbytes, header = fields[3], fields[4], fields[8], fields[9], fields[16]
        name_end = position + _ENTRY.size + fields[10]
        extra_end = name_end + fields[11]
        if _FULL32 in (packed, nbytes, header):
            nbytes, packed, header = _zip64_numbers(directory[name_end:extra_end], nbytes, packed, header)
        if fields[0] != b"PK\1\2" or method or flags & 1 or packed != nbytes or nbytes < 0:
            raise _UnusualError
        name = directory[position + _ENTRY.size : name_end].decode()
        root = root or name.partition("/")[0] + "/"
        yield name.removeprefix(root), (header, nbytes)
        position = extra_end + fields[12]


def _zip64_numbers(extra: bytes, *numbers: int) -> list[int]:
    """The numbers that did not fit into 32 bits, taken in order from the extra field of kind 1."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, position + 4))
            return [next(wide, -1) if n == _FULL32 else n for n in numbers]
        position += 4 + length
    raise _UnusualError


def read_archived_object(file: MappedFile, offset: int, length: int, *, allow_pickle: bool = False) -> Any:
    """The value in an archive, of any type that torch deems safe.

    Args:
        offset: Where the archive begins in the file, in bytes.
        length: Its length in bytes.
        allow_pickle: Read any pickle, **which runs whatever code it holds**. Only for files of an author you trust.

    Raises:
        IncompleteCheckpointError: when the file ends before the archive does.
        UnsafeCheckpointError: when it is of a type that is not known to be safe, and ``allow_pickle`` is off.
        CorruptCheckpointError: when it is no archive.
    """
    data = io.BytesIO(file.bytes(offset, length))
    where = f"bytes {offset} to {offset + length}"
    try:
        return torch.load(data, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(file.path, f"{where} are of a type that was not read: {error}") from error
    except Exception as error:  # a dozen types, RuntimeError and EOFError among them
        reason = f"{where} are no torch.save archive: {type(error).__name__}: {error}"
        raise CorruptCheckpointError(file.path, reason) from error


def _unpacked(file: MappedFile, offset: int, length: int) -> Tensor:
    """The tensor as torch reads it, for archives that are compressed, or whose tensor is of a special kind."""
    value = read_archived_object(file, offset, length)
    if not isinstance(value, Tensor):
        where = f"bytes {offset} to {offset + length}"
        raise CorruptCheckpointError(file.path, f"{where} hold a {type(value).__name__} where a tensor should be")
    return value.detach()
