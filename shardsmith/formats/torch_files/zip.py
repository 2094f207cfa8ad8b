"""The zip that ``torch.save`` writes, as byte ranges of a file.

Its members are stored, not compressed: ``<root>/data.pkl`` says how tensors lie in ``<root>/data/<key>``, which are
plain bytes. Only the directory at the end of the zip is read, by hand: ``zipfile`` takes ten times as long, and there
are thousands of archives in a checkpoint.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator

from shardsmith.formats.torch_files.tensor_pickle import TensorRecord
from shardsmith.ground.file_tensor import FileTensor
from shardsmith.ground.mapped import MappedFile

_END = struct.Struct("<4s4H2IH")  # the last 22 bytes of a zip without a comment
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # "look for the number in the zip64 record"


class UnusualArchiveError(ValueError):
    """Not laid out as ``torch.save`` lays things out on a little-endian machine; torch itself may read it."""


class TorchZip:
    """The members of a zip that is ``length`` bytes of a file, by their name below the root folder."""

    def __init__(self, file: MappedFile, offset: int, length: int, max_entries: int) -> None:
        """Read the directory. Raises UnusualArchiveError, as everything here does, if it is not of the usual kind."""
        self._file = file
        self._offset = offset
        self._length = length
        try:
            count, size, start = self._directory()
            if count > max_entries:
                raise UnusualArchiveError
            self._members = dict(_entries(self._bytes(start, size), count))
        except (struct.error, UnicodeDecodeError) as error:
            raise UnusualArchiveError from error
        # torch < 2.1 did not write the byte order; it could only be the machine's own.
        order = self.content("byteorder", 6) if "byteorder" in self._members else b"little"
        if order != b"little" or sys.byteorder != "little":
            raise UnusualArchiveError
        self._payloads: dict[str, tuple[int, int]] = {}

    def content(self, name: str, max_bytes: int) -> bytes:
        """Return the bytes of a small member."""
        start, nbytes = self._locate(name)
        if nbytes > max_bytes:
            raise UnusualArchiveError
        return self._bytes(start, nbytes)

    def tensor(self, record: TensorRecord) -> FileTensor:
        """Return where a tensor lies, with the shape and strides that were saved."""
        start = 0
        if record.storage_nbytes:
            name = f"data/{record.storage}"
            if name not in self._payloads:  # tensors may share one
                self._payloads[name] = self._locate(name)
            start, nbytes = self._payloads[name]
            if nbytes != record.storage_nbytes:
                raise UnusualArchiveError
        begin = self._offset + start + record.offset * record.dtype.itemsize
        return FileTensor(self._file, begin, record.size, record.stride, record.dtype)

    def _locate(self, name: str) -> tuple[int, int]:
        """Start and length of a member. The local header has padding of its own in front of the bytes."""
        if name not in self._members:
            raise UnusualArchiveError
        header, nbytes = self._members[name]
        fields = _LOCAL.unpack(self._bytes(header, _LOCAL.size))  # so many bytes, or _bytes has raised
        # Name and extra field of the local header: their lengths may differ from those in the directory.
        start = header + _LOCAL.size + fields[9] + fields[10]
        if fields[0] != b"PK\3\4" or start + nbytes > self._length:
            raise UnusualArchiveError
        return start, nbytes

    def _directory(self) -> tuple[int, int, int]:
        """Number of entries, length and start of the central directory."""
        # torch writes no comment, so the end record is at a known place and need not be searched for.
        end = self._length - _END.size
        signature, *_, count, size, start, comment = _END.unpack(self._bytes(end, _END.size))
        if signature != b"PK\5\6" or comment:
            raise UnusualArchiveError
        # In zip64 the real numbers are in a second end record, found through a locator in front of the first.
        if count == _FULL16 or size == _FULL32 or start == _FULL32:
            _, _, end64, _ = _END64_LOCATOR.unpack(self._bytes(end - _END64_LOCATOR.size, _END64_LOCATOR.size))
            signature, *_, count, size, start = _END64.unpack(self._bytes(end64, _END64.size))
            if signature != b"PK\6\6":
                raise UnusualArchiveError
        return count, size, start

    def _bytes(self, start: int, nbytes: int) -> bytes:
        """A range of the archive. Numbers out of it come from strangers."""
        if start < 0 or start + nbytes > self._length:
            raise UnusualArchiveError
        return self._file.bytes(self._offset + start, nbytes)


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
        # Bit 0 of the flags is encryption; a compressed or encrypted member is no plain byte range.
        if fields[0] != b"PK\1\2" or method or flags & 1 or packed != nbytes or nbytes < 0:
            raise UnusualArchiveError
        name = directory[position + _ENTRY.size : name_end].decode()
        # All members lie in one folder, named after the file; its name differs from file to file.
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
            # -1 where the field has too few numbers: the caller refuses negative ones.
            return [next(wide, -1) if n == _FULL32 else n for n in numbers]
        position += 4 + length
    raise UnusualArchiveError
