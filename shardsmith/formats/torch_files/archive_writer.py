"""The ``torch.save`` archive of one contiguous tensor, written around bytes that pass by: the inverse of
``archive``.

A zip of four members, stored and not compressed: ``data.pkl`` says what the tensor looks like, ``byteorder`` and
``version`` say how it was written, ``data/0`` is its bytes, last and aligned. Their checksum is only known in the end;
so, as zip allows, it comes behind them, and in the directory at the end of the zip.
"""

from __future__ import annotations

import collections
import functools
import io
import pickle
import struct
import zlib
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2, _rebuild_tensor_v3

from shardsmith.tensors.tensors import Shape

ALIGNMENT = 64
"""Of the payload, from the start of the archive: as torch itself aligns it."""
MOST_BYTES = 1 << 31
"""Of a payload: larger ones would need another kind of zip."""

# As in zip.py, but here sizes are 32 bits wide: MOST_BYTES keeps all of them below that, without a zip64 record.
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_DESCRIPTOR = struct.Struct("<4s3I")
_END = struct.Struct("<4s4H2IH")
_CHECKSUM_FOLLOWS = 1 << 3
_UTF8 = 1 << 11
_DATE = 0x21
"""1980-01-01, the first day that a zip knows."""
_PADDING = 0x4246
"""Kind of the extra field by which torch, too, moves the payload."""


class ArchiveLayout:
    """What stands before and behind the bytes of a tensor.

    Attributes:
        head: All before them.
        length: Of the whole archive in bytes.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        """A contiguous tensor of this shape, of at most ``MOST_BYTES``."""
        self.nbytes = torch.Size(shape).numel() * dtype.itemsize
        assert self.nbytes <= MOST_BYTES
        members = {
            "archive/data.pkl": _pickled(tuple(shape), dtype),
            "archive/byteorder": b"little",
            # The format version of torch's own writer; its reader refuses an archive without one.
            "archive/version": b"3\n",
        }
        out = io.BytesIO()
        # The directory repeats for each member where its local header begins.
        self._entries = []
        for name, content in members.items():
            self._entries.append(_entry(name, 0, _crc(content), len(content), out.tell()))
            out.write(_local(name, 0, _crc(content), len(content), b"") + content)
        self._payload_at = out.tell()
        payload = "archive/data/0"
        # 4 bytes are kind and length of the extra field; its content then moves the payload to the boundary.
        unpadded = self._payload_at + _LOCAL.size + len(payload) + 4
        padding = struct.pack("<2H", _PADDING, -unpadded % ALIGNMENT) + bytes(-unpadded % ALIGNMENT)
        # Checksum and sizes are zero here, as the flag says: they follow the payload in the descriptor.
        out.write(_local(payload, _CHECKSUM_FOLLOWS, 0, 0, padding))
        self.head = out.getvalue()
        # The tail has the same length whatever the checksum is.
        self.length = len(self.head) + self.nbytes + len(self.tail(0))

    def tail(self, crc32: int) -> bytes:
        """Return all behind the bytes of the tensor, whose CRC-32 this is."""
        descriptor = _DESCRIPTOR.pack(b"PK\7\x08", crc32, self.nbytes, self.nbytes)
        entry = _entry("archive/data/0", _CHECKSUM_FOLLOWS, crc32, self.nbytes, self._payload_at)
        directory = b"".join([*self._entries, entry])
        # All positions in a zip count from the start of the archive, not of the file that it is a part of.
        start = len(self.head) + self.nbytes + len(descriptor)
        count = len(self._entries) + 1
        return descriptor + directory + _END.pack(b"PK\5\6", 0, 0, count, count, len(directory), start, 0)


@functools.lru_cache(maxsize=4096)
def archive_layout(shape: Shape, dtype: torch.dtype) -> ArchiveLayout:
    """The layout; a model has few different ones."""
    return ArchiveLayout(shape, dtype)


class _Storage:
    """Stands for the storage of the tensor that is described."""


class _Described:
    """Pickles as a tensor does whose storage is member ``data/0``."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self._shape = shape
        self._dtype = dtype

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The meta device gives the strides of a contiguous tensor without its memory.
        strides = torch.empty(self._shape, device="meta").stride()
        arguments: tuple[Any, ...] = (_Storage(), 0, self._shape, strides, False, collections.OrderedDict())
        # v3 states the dtype as its last argument; v2 has it from the class of the storage.
        if _storage_class(self._dtype) is None:
            return _rebuild_tensor_v3, (*arguments, self._dtype)
        return _rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, numel: int, dtype: torch.dtype) -> None:
        # The protocol that torch.save uses by default.
        super().__init__(file, protocol=2)
        typed = _storage_class(dtype)
        # torch counts a typed storage in elements and an untyped one in bytes.
        count = numel if typed else numel * dtype.itemsize
        self._storage = ("storage", typed or torch.UntypedStorage, "0", "cpu", count)

    def persistent_id(self, obj: Any) -> Any:
        return self._storage if isinstance(obj, _Storage) else None


def _pickled(shape: Shape, dtype: torch.dtype) -> bytes:
    file = io.BytesIO()
    _Pickler(file, torch.Size(shape).numel(), dtype).dump(_Described(shape, dtype))
    return file.getvalue()


def _storage_class(dtype: torch.dtype) -> Any:
    """The class by which old versions of torch name a dtype; None for dtypes that came later."""
    if dtype in torch.storage._new_dtypes():
        return None
    return getattr(torch, torch.storage._dtype_to_storage_type_map()[dtype])


def _crc(content: bytes) -> int:
    return zlib.crc32(content)


def _local(name: str, flags: int, crc: int, nbytes: int, extra: bytes) -> bytes:
    encoded = name.encode()
    header = _LOCAL.pack(b"PK\3\4", 0, flags | _UTF8, 0, 0, _DATE, crc, nbytes, nbytes, len(encoded), len(extra))
    return header + encoded + extra


def _entry(name: str, flags: int, crc: int, nbytes: int, at: int) -> bytes:
    encoded = name.encode()
    sizes = (crc, nbytes, nbytes, len(encoded), 0, 0, 0, 0, 0, at)
    return _ENTRY.pack(b"PK\1\2", 0, 0, flags | _UTF8, 0, 0, _DATE, *sizes) + encoded
