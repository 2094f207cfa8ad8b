"""The index of a DCP directory as plain values that were checked against each other and against the files.

Nothing in an index is believed: not the file names, which could lead anywhere, and not that the chunks of a tensor
cover it. torch itself loads a tensor with missing chunks without a word and leaves the old values in its holes.
"""

from __future__ import annotations

import contextlib
import functools
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardsmith.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    UnsafeCheckpointError,
    UnsupportedFormatError,
)
from shardsmith.formats.dcp.index_pickle import MAX_INDEX_BYTES, MAX_KNOWN_INDEX_BYTES, load_dcp_index
from shardsmith.formats.dcp.saved_index import SavedBytes, SavedIndex, SavedTensor
from shardsmith.formats.torch_files.archive import DEQUANTIZE, tensor_class
from shardsmith.ground.garbage import without_collection
from shardsmith.ground.layout import DCP_INDEX_FILE
from shardsmith.ground.mapped import MappedFile
from shardsmith.ground.remote_path import as_path
from shardsmith.manifest.checkpoints import hash_file
from shardsmith.manifest.metadata import has_manifest, read_metadata
from shardsmith.sharding.boxes import IrregularBoxesError, find_overlap
from shardsmith.tensors.checkpoint_keys import KeyPath
from shardsmith.tensors.tensors import Chunk, Shape, TensorSpec

_PLAIN_NAME = re.compile(r"(?!\.{1,2}$)[^/\\:\0-\x1f\ud800-\udfff]{1,255}")
_MAX_LIST_INDEX = 1_000_000  # torch makes a list of that length


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A part of a tensor and the bytes that hold it: a ``torch.save`` archive."""

    chunk: Chunk
    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class StoredObject:
    """The bytes that hold a value that is no tensor: a ``torch.save`` archive."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class DcpEntry:
    """A tensor and its chunks: none is empty, no two overlap, and together they cover it."""

    spec: TensorSpec
    chunks: Sequence[StoredChunk]


@dataclass(frozen=True, slots=True)
class DcpIndex:
    """What a DCP directory holds."""

    path: Path
    """The directory."""
    tensors: Mapping[str, DcpEntry]
    objects: Mapping[str, StoredObject]
    """Values that are no tensors."""
    containers: Mapping[str, KeyPath]
    """Where each key lies in the nested state dict that was saved; ``(key,)`` if it was flat."""
    files: Mapping[str, int]
    """Name of each file that the index uses -> its size on disk in bytes."""

    def below(self, top: str) -> Iterator[tuple[str, KeyPath]]:
        """Yield the keys that lie at or below a top-level key of the nested state dict, with their paths, in order."""
        return ((key, path) for key, path in self.containers.items() if path[0] == top)

    def top_keys(self) -> set[str]:
        """Return the first parts of all keys."""
        return {key.split(".", 1)[0] for key in self.containers}

    def is_of_rank(self, key: str) -> bool:  # noqa: ARG002
        """Return whether a key is known to be here, among those that a rank has for itself, without being looked up."""
        return False

    def close(self) -> None:
        """Close what it is read from, if it is read as it is asked. Any number of calls."""


def read_index(directory: str | Path, *, follow_links: bool = False) -> DcpIndex:
    """Read and check the index of a DCP directory. No communication; no tensor is read.

    Args:
        directory: A DCP directory.
        follow_links: Accept files that are symbolic links, as in a Hugging Face cache.

    Raises:
        CheckpointNotFoundError: when there is no ``.metadata``.
        IncompleteCheckpointError: when it is empty, files are missing or too short, or tensors have holes. Names all.
        UnsafeCheckpointError: when it asks for code to be run, or names something that is no file beside it.
        UnsupportedFormatError: when chunks were compressed or transformed by an extension, or are sparse.
        CorruptCheckpointError: when it is no index, or contradicts itself.
    """
    path = as_path(directory)
    most = _most_bytes(path)
    # The bytes are read each time: the cache below is by content, so an index that was replaced is parsed anew.
    data = _read_bytes(path / DCP_INDEX_FILE, follow_links, most)
    known = _known_index(path, data, follow_links)
    # The index may be the same while a data file was removed or cut: the sizes are looked at again.
    if not known or any(size_of_file(path / name, follow_links) != n for name, n in known[0].files.items()):
        with without_collection():  # which would look at millions of parts again and again
            known[:] = [_Checker(path, load_dcp_index(data, path / DCP_INDEX_FILE, most), follow_links).index()]
    return known[0]


@functools.lru_cache(maxsize=2)  # one command looks at the same index several times, and that takes most of its time
def _known_index(path: Path, data: bytes, follow_links: bool) -> list[DcpIndex]:  # noqa: ARG001
    """A place for what these bytes say of a directory; empty if they have not been read yet."""
    return []


def _most_bytes(directory: Path) -> int:
    """Of an index. A larger one is read if a manifest beside it has it: whoever saved it had it in memory, too."""
    path = directory / DCP_INDEX_FILE
    size = size_of_file(path, follow_links=True)
    if size is None or size <= MAX_INDEX_BYTES or not has_manifest(directory):
        return MAX_INDEX_BYTES
    record = read_metadata(directory).files.get(DCP_INDEX_FILE)
    # The hash shows that a save of ours wrote it. Any other large index keeps the smaller limit and is refused.
    if record is None or size > MAX_KNOWN_INDEX_BYTES or hash_file(path) != record.xxh3_128:
        return MAX_INDEX_BYTES
    return size


def _read_bytes(path: Path, follow_links: bool, most: int) -> bytes:
    try:
        file = MappedFile(path, follow_links=follow_links)
    except CheckpointNotFoundError:
        if path.parent.is_dir() and any(path.parent.glob("*.distcp")):
            raise IncompleteCheckpointError(
                path.parent, f"has shards but no {path.name}, which is written last: the save did not finish"
            ) from None
        raise CheckpointNotFoundError(path.parent, f"is no DCP directory: there is no {path.name} in it") from None
    if file.size == 0:
        raise IncompleteCheckpointError(path, "is empty: it was lost in a crash after the save")
    if file.size > most:
        raise UnsupportedFormatError(
            path,
            f"has {file.size} bytes; an index may have up to {MAX_INDEX_BYTES}, and up to {MAX_KNOWN_INDEX_BYTES} "
            "beside a metadata.json that has its hash",
        )
    return file.bytes(0, file.size)


class _Checker:
    """Rebuilds an index part by part. What is missing is collected; what is wrong ends the reading at once."""

    def __init__(self, directory: Path, saved: SavedIndex, follow_links: bool) -> None:
        self.directory = directory
        self.saved = saved
        self.follow_links = follow_links
        self.sizes: dict[str, int | None] = {}
        self.holes: list[str] = []

    def index(self) -> DcpIndex:
        tensors, objects = {}, {}
        for name, entry in self.saved.entries.items():
            if entry is not None:
                tensors[name] = self.tensor(name, entry)
            elif (place := self.place(name, None)) is not None:
                objects[name] = StoredObject(place.file, place.offset, place.length)
        self.report_missing()
        files = {name: size for name, size in self.sizes.items() if size is not None}
        return DcpIndex(self.directory, tensors, objects, self.containers(), files)

    def tensor(self, name: str, entry: SavedTensor) -> DcpEntry:
        spec = TensorSpec(name, entry.shape, entry.dtype)
        boxes = self.boxes(spec, entry.chunks)
        self.check_apart(spec, boxes)
        # The boxes lie in the tensor and do not overlap, so equal counts mean that nothing is missing.
        absent = spec.numel - sum(box.numel for box in boxes)
        if absent:
            self.holes.append(f"tensor {name!r}: {absent} of {spec.numel} elements are in no chunk")
        return DcpEntry(spec, tuple(chunk for box in boxes if (chunk := self.chunk(spec, box)) is not None))

    def boxes(self, spec: TensorSpec, saved: tuple[Chunk, ...]) -> list[Chunk]:
        """Return the chunks that hold anything, each once: of a rank without rows the chunk is empty."""
        boxes: dict[Chunk, None] = {}
        for box in saved:
            if not len(box.offsets) == len(box.sizes) == len(spec.shape):
                raise self.corrupt(f"tensor {spec.name!r} of shape {spec.shape} has a chunk of another rank: {box}")
            if any(start + n > whole for start, n, whole in zip(box.offsets, box.sizes, spec.shape, strict=True)):
                raise self.corrupt(f"tensor {spec.name!r} of shape {spec.shape} has a chunk outside of it: {box}")
            if box.numel:
                # A dict keeps the order and drops replicas: some writers list the same chunk for several ranks.
                boxes[box] = None
        return list(boxes)

    def chunk(self, spec: TensorSpec, box: Chunk) -> StoredChunk | None:
        place = self.place(spec.name, box.offsets)
        if place is None:
            return None
        # At least: an archive has a head and a directory beside the values.
        if place.length < box.numel * spec.dtype.itemsize:
            with contextlib.closing(MappedFile(self.directory / place.file, follow_links=self.follow_links)) as file:
                kind = tensor_class(file, place.offset, place.length)
            if kind is not None:
                raise UnsupportedFormatError(self.directory, f"{spec.name} is {kind}; {DEQUANTIZE}")
            raise self.corrupt(f"tensor {spec.name!r}: {place.length} bytes cannot hold the chunk {box}")
        return StoredChunk(box, place.file, place.offset, place.length)

    def check_apart(self, spec: TensorSpec, boxes: list[Chunk]) -> None:
        try:
            overlap = find_overlap(boxes)
        except IrregularBoxesError as error:
            raise self.corrupt(f"tensor {spec.name!r} is cut up too irregularly to be checked: {error}") from error
        if overlap:
            raise self.corrupt(f"tensor {spec.name!r} has chunks that overlap: {overlap[0]} and {overlap[1]}")

    def place(self, name: str, offsets: Shape | None) -> SavedBytes | None:
        """Return where a chunk, or an object without offsets, is stored; None, noted down, when it is not all there."""
        place = self.saved.places.get((name, offsets))
        if place is None:
            self.holes.append(f"{_called(name, offsets)}: was never written")
            return None
        # torch's stream extensions, such as compression, list themselves here; the bytes are then no archive.
        if place.transforms:
            reason = f"{_called(name, offsets)} was saved through {list(place.transforms)}; only plain data is read"
            raise UnsupportedFormatError(self.directory, reason)
        size, end = self.size_of(place.file), place.offset + place.length
        if size is None or size < end:
            fault = "is missing" if size is None else f"ends at byte {size}, not {end} or later"
            self.holes.append(f"{_called(name, offsets)}: its file {place.file} {fault}")
            return None
        return place

    def size_of(self, name: str) -> int | None:
        """Size of a file in bytes, or None when there is no such file."""
        if name not in self.sizes:
            # Before the path is touched: a name such as ../x would look outside of the directory.
            require_plain_name(self.directory / DCP_INDEX_FILE, name)
            self.sizes[name] = size_of_file(self.directory / name, self.follow_links)
        return self.sizes[name]

    def containers(self) -> dict[str, KeyPath]:
        paths = {name: self.saved.containers.get(name, (name,)) for name in self.saved.entries}
        for name, path in paths.items():
            try:
                require_path(path)
            except ValueError as error:
                raise self.corrupt(f"{name!r} has no usable place in the nested state dict") from error
        return paths

    def report_missing(self) -> None:
        if self.holes:
            raise IncompleteCheckpointError(
                self.directory,
                "\n  ".join([f"{len(self.holes)} parts are not there", *self.holes])
                + "\nNothing was read. Copy the missing files again, or use another step.",
            )

    def corrupt(self, reason: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(self.directory / DCP_INDEX_FILE, reason)


def _called(name: str, offsets: Shape | None) -> str:
    return f"object {name!r}" if offsets is None else f"tensor {name!r}, chunk at {offsets}"


def require_path(path: Sequence[object]) -> KeyPath:
    """Return a place in a nested state dict; ValueError if it is none that torch can make."""
    steps = tuple(step for step in path if type(step) is str or (type(step) is int and 0 <= step <= _MAX_LIST_INDEX))
    if not steps or len(steps) != len(path):
        raise ValueError(f"no usable path of {len(path)} steps")
    return steps


def require_plain_name(index: Path, name: str) -> None:
    """Raise UnsafeCheckpointError if what an index names is no file beside it."""
    if not _PLAIN_NAME.fullmatch(name):
        raise UnsafeCheckpointError(index, f"names {name!r:.300}, no file beside it")


def size_of_file(path: Path, follow_links: bool) -> int | None:
    """Return the size of a file in bytes; None if there is none. Raises UnsafeCheckpointError, CheckpointError."""
    try:
        # lstat unless links are accepted: a link could name any file of the machine, a FIFO would block the reader.
        status = path.stat(follow_symlinks=follow_links)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(path, f"cannot be looked at: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeCheckpointError(path, "is not a regular file (links are not followed); nothing was read")
    return status.st_size
