"""What the index of a DCP directory (``.metadata``, a pickle) says, read without running it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import torch

from shardsmith.errors import CheckpointError, CorruptCheckpointError, UnsupportedFormatError
from shardsmith.formats.dcp.index_runs import IndexRuns
from shardsmith.formats.dcp.saved_index import (
    CHECKPOINT,
    CHUNK,
    INDEX,
    SIZE,
    STORAGE_INFO,
    SavedBytes,
    SavedIndex,
    SavedTensor,
)
from shardsmith.formats.torch_files.pickle_machine import Made, Name, Ready, Run, read_pickle
from shardsmith.tensors.tensors import Chunk, Shape

MAX_INDEX_BYTES = 1 << 30
MAX_KNOWN_INDEX_BYTES = 1 << 34
"""Of an index whose hash a manifest has."""
MAX_DIMS = 64

DTYPES = {Name("torch", n): v for n, v in vars(torch).items() if isinstance(v, torch.dtype)}
"""Every ``torch.<dtype>`` by the name under which it is pickled."""

_SHARD = "torch.distributed._shard.sharded_tensor.metadata"  # where torch < 2.2 had the tensor properties
_METADATA = Name(CHECKPOINT, "Metadata")
_STORAGE_META = Name(CHECKPOINT, "StorageMeta")
_TENSOR = Name(CHECKPOINT, "TensorStorageMetadata")
_BYTES = Name(CHECKPOINT, "BytesStorageMetadata")
_PROPERTIES = {Name(CHECKPOINT, "TensorProperties"), Name(_SHARD, "TensorProperties")}
_MEMORY_FORMATS = {Name(CHECKPOINT, "_MEM_FORMAT_ENCODING"), Name(_SHARD, "MEM_FORMAT_ENCODING")}
_GETATTR = Name("builtins", "getattr")  # how Python 3.11.0 to 3.11.3 pickled an enum
_LAYOUT = Name("torch.serialization", "_get_layout")
# Python 3.13 writes pathlib._local, which older ones cannot import.
_PATHS = {Name(m, n) for m in ("pathlib", "pathlib._local") for n in ("PosixPath", "WindowsPath")}
_PATHS |= {Name(m, "Pure" + n) for m, n in _PATHS}

_INDEX_NAMES = frozenset(
    {_METADATA, INDEX, _STORAGE_META, _TENSOR, _BYTES, CHUNK, STORAGE_INFO, SIZE, _LAYOUT, _GETATTR}
    | _PROPERTIES
    | _MEMORY_FORMATS
    | _PATHS
    | set(DTYPES)
)


def load_dcp_index(data: bytes, path: Path, most_bytes: int = MAX_INDEX_BYTES) -> SavedIndex:
    """Return what ``.metadata`` of a DCP directory says.

    Every field has its exact type and every number lies in 0..2**63-1; whether they make sense together is left to
    ``formats.dcp.index.read_index``.

    Args:
        data: The bytes of the file.
        path: The file, for the errors.
        most_bytes: That it may have.

    Raises:
        UnsafeCheckpointError: when it names a class that no index needs, or asks for code to be run.
        CorruptCheckpointError: when it is no pickle, or not one of an index.
        UnsupportedFormatError: when it is larger than that or holds sparse tensors.
    """
    if len(data) > most_bytes:
        raise UnsupportedFormatError(path, f"has {len(data)} bytes; an index may have up to {most_bytes}")

    def read(runs: Mapping[Name, Run] | None = None) -> SavedIndex:
        return _IndexDecoder(path, len(data)).index(read_pickle(data, path, _INDEX_NAMES, runs=runs))

    # Millions of boxes at once; what they do not fit, and what is wrong, is found by one instruction after the other.
    with contextlib.suppress(CheckpointError):
        return read(IndexRuns().by_name)
    return read()


_PARTS_OF_A_BOX = 9
"""The record, its two fields and sizes, and two numbers each: so much does a box cost that is not from a run."""


class _IndexDecoder:
    """Turns the records of an index into plain values. Fields that are not needed are passed over.

    The parts of a pickle may be shared, so a short one can describe a structure of any size. In an honest one every
    part has bytes of its own, and ``budget`` ends the reading when the parts by far outnumber the bytes.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        # Each honest part takes more than a byte of the file, so an honest index never comes near this.
        self.budget = 4 * nbytes

    def index(self, value: object) -> SavedIndex:
        fields = self.fields(value, {_METADATA})
        entries = self.mapping(fields.get("state_dict_metadata"), "state_dict_metadata")
        places = self.mapping(fields.get("storage_data"), "storage_data")
        names = fields.get("planner_data")
        return SavedIndex(
            entries={self.text(k): self.entry(v) for k, v in entries.items()},
            containers={} if names is None else self.containers(names),
            places={self.place(k): self.bytes(v) for k, v in places.items()},
        )

    def entry(self, value: object) -> SavedTensor | None:
        fields = self.fields(value, {_TENSOR, _BYTES})
        if isinstance(value, Made) and value.of == _BYTES:
            return None
        return SavedTensor(
            shape=self.size(fields.get("size")),
            dtype=self.dtype(fields.get("properties")),
            chunks=tuple(self.chunk(c) for c in self.items(fields.get("chunks"), "chunks")),
        )

    def dtype(self, value: object) -> torch.dtype:
        """Of a tensor's properties only this means something here; the sixth, from torch 2.15 on, are its strides."""
        if type(value) is not Made or value.of not in _PROPERTIES or type(value.state) is not tuple:
            self.fail("tensor properties", value)
        # The tuple that TensorProperties.__getstate__ returns: dtype, layout, requires_grad, memory format, pin_memory.
        dtype, layout = value.state[:2] if len(value.state) in (5, 6) else (None, None)
        if type(layout) is not Made or layout.of != _LAYOUT or type(dtype) is not Name or dtype not in DTYPES:
            self.fail("dtype and layout", value.state)
        if layout.args != ("torch.strided",):
            raise UnsupportedFormatError(self.path, "holds a sparse tensor; only dense ones are read")
        return DTYPES[dtype]

    def chunk(self, value: object) -> Chunk:
        if type(value) is Chunk:  # from a run
            self.spend(_PARTS_OF_A_BOX)
            return value
        fields = self.fields(value, {CHUNK})
        return Chunk(offsets=self.size(fields.get("offsets")), sizes=self.size(fields.get("sizes")))

    def place(self, value: object) -> tuple[str, Shape | None]:
        if type(value) is Ready:  # from a run
            place: tuple[str, Shape | None] = value.value
            return place
        # MetadataIndex has a third field, the position of the chunk: a hint for torch's planner that is not needed.
        fields = self.fields(value, {INDEX})
        offsets = fields.get("offset")
        return self.text(fields.get("fqn")), None if offsets is None else self.size(offsets)

    def bytes(self, value: object) -> SavedBytes:
        if type(value) is SavedBytes:  # from a run
            return value
        fields = self.fields(value, {STORAGE_INFO})
        transforms = fields.get("transform_descriptors")
        return SavedBytes(
            self.text(fields.get("relative_path")),
            self.number(fields.get("offset")),
            self.number(fields.get("length")),
            () if transforms is None else tuple(self.text(t) for t in self.items(transforms, "transforms")),
        )

    def containers(self, value: object) -> dict[str, tuple[str | int, ...]]:
        names = self.mapping(value, "planner_data")
        return {self.text(k): tuple(self.step(s) for s in self.items(v, "a path")) for k, v in names.items()}

    def step(self, value: object) -> str | int:
        return value if type(value) is str else self.number(value)

    def size(self, value: object) -> Shape:
        """Return a shape or a position. Some writers leave plain sequences in the place of ``torch.Size``."""
        if type(value) is Made and value.of == SIZE and len(value.args) == 1:
            value = value.args[0]
        numbers = self.items(value, "a size")
        if len(numbers) > MAX_DIMS:
            self.fail(f"at most {MAX_DIMS} dimensions", value)
        return tuple(map(self.number, numbers))

    def fields(self, value: object, kinds: set[Name]) -> dict[str | int | Made, object]:
        # Parts may be shared, so each visit costs, not each part.
        self.spend(1)
        if type(value) is not Made or value.of not in kinds or value.args:
            self.fail(" or ".join(kind.name for kind in sorted(kinds)), value)
        return {} if value.state is None else self.mapping(value.state, "fields")

    def mapping(self, value: object, what: str) -> dict[str | int | Made, object]:
        if type(value) is not dict:
            self.fail(f"a dict ({what})", value)
        self.spend(len(value))
        return value

    def items(self, value: object, what: str) -> list[object] | tuple[object, ...]:
        if type(value) is not list and type(value) is not tuple:
            self.fail(f"a sequence ({what})", value)
        self.spend(len(value))
        return value

    def text(self, value: object) -> str:
        if type(value) is not str:
            self.fail("a string", value)
        return value

    def number(self, value: object) -> int:
        # type() and not isinstance(): True is an int, too.
        if type(value) is not int or not 0 <= value < 1 << 63:
            self.fail("a number from 0 to 2**63 - 1", value)
        return value

    def spend(self, count: int) -> None:
        self.budget -= count
        if self.budget < 0:
            raise CorruptCheckpointError(self.path, "is no DCP index: its parts contain each other in a cycle")

    def fail(self, expected: str, found: object) -> NoReturn:
        # Never the value itself: its text can be endless.
        what = str(found.of) if type(found) is Made else type(found).__name__
        raise CorruptCheckpointError(self.path, f"is no DCP index: expected {expected}, found {what}")
