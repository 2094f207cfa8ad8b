"""Tensors filled from the files of a DCP directory, each of which is read once and hashed while it is read.

What a rank wants of a file is copied block by block as the file passes by. Whether the file is what was written is
known at its end: until then what was filled must not be used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from shardsmith.errors import CheckpointError
from shardsmith.formats.dcp.file_stream import BLOCK_BYTES, FileStream
from shardsmith.formats.dcp.index import StoredChunk
from shardsmith.formats.dcp.rank_file import moved
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.formats.torch_files.archive_writer import MOST_BYTES, archive_layout
from shardsmith.ground.threads import useful_threads
from shardsmith.manifest.metadata import FileRecord
from shardsmith.tensors.narrowing import LostValues, is_narrower
from shardsmith.tensors.tensors import Chunk, row_major_blocks


@dataclass(frozen=True, slots=True)
class Wanted:
    """A stored chunk of which a part is wanted, and where that goes."""

    key: str
    stored: StoredChunk
    dtype: torch.dtype
    part: Chunk
    """Of the global tensor."""
    box: Chunk
    """That ``out`` holds."""
    out: Tensor
    lost: LostValues | None = None
    """Where to note finite values that are infinite in ``out``; None where its dtype has room for all."""

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield the bytes of the file that are read for it: the head of the archive, and the blocks between its ends.

        A guess where the archive is not as we write them.
        """
        size, chunk = self.dtype.itemsize, self.stored.chunk
        head = self.stored.offset + len(archive_layout(chunk.sizes, self.dtype).head)
        yield self.stored.offset, head
        block = max(1, BLOCK_BYTES // size)
        # Whole blocks, as _fill_chunk takes them: a block of which one element is wanted is read as a whole.
        first, last = (_position(self.part, chunk, end) // block for end in (0, 1))
        yield head + first * block * size, head + min((last + 1) * block, chunk.numel) * size

    def copy(self, values: Tensor, block: Chunk) -> None:
        """Take what is wanted of a block of the global tensor."""
        # The usual case, of a resume on the same ranks with boxes of at most a block: no slices are made.
        if block == self.box:
            self._take(self.out, values)
        elif (common := self.part.intersect(block)) is not None:
            self._take(self.out[common.within(self.box)], values[common.within(block)])

    def _take(self, out: Tensor, values: Tensor) -> None:
        out.copy_(values)
        if self.lost is not None:
            # Cast once more, as ``out`` may be on another device.
            self.lost.add(self.key, values.to(out.dtype), lambda: values)


def _position(part: Chunk, outer: Chunk, end: int) -> int:
    """Number of the first element of a box in an outer one, or with ``end=1`` of the last, in row-major order."""
    position = 0
    for a, n, b, whole in zip(part.offsets, part.sizes, outer.offsets, outer.sizes, strict=True):
        # Horner's scheme for the row-major index of the corner, in the outer box's own sizes.
        position = position * whole + a - b + end * (n - 1)
    return position


def find_wanted(
    source: DcpSource, tensors: Iterable[tuple[str, Chunk, Tensor]], lost: LostValues
) -> dict[str, list[Wanted]]:
    """Return where the values of boxes lie: by file, in the order in which they lie there.

    Args:
        source: The directory.
        tensors: Key, box and the tensor to fill, which has the shape of the box.
        lost: Where a copy is to note finite values that are infinite in the dtype of the tensor to fill.

    Raises:
        CheckpointError: the directory does not cover a box.
    """
    found: dict[str, list[Wanted]] = {}
    for key, box, out in tensors:
        dtype, filled = source.specs[key].dtype, 0
        noted = lost if is_narrower(out.dtype, dtype) else None
        for _, stored, part in source.stored(key, box):
            found.setdefault(stored.file, []).append(Wanted(key, stored, dtype, part, box, out, noted))
            filled += part.numel
        if filled != box.numel:
            raise CheckpointError(source.path, f"{key}: only {filled} of {box.numel} elements of {box} are stored")
    for wanted in found.values():
        # FileStream goes forward only; a stable sort keeps the takers of one chunk together.
        wanted.sort(key=lambda one: one.stored.offset)
    return found


def read_files(
    source: DcpSource, wanted: Mapping[str, Sequence[Wanted]], verified: Mapping[str, FileRecord], *, follow_links: bool
) -> list[str]:
    """Fill the tensors; return what is wrong with the files that are to be verified, a line each. No communication.

    Args:
        source: The directory.
        wanted: By file, what to fill; see ``find_wanted``.
        verified: The files to hash, whether anything of them is wanted or not.
        follow_links: Accept files that are symbolic links.

    Raises:
        CheckpointError: something could not be read of a file that is not to be verified, or is no such tensor.
    """
    # Files that are only verified are read as well: each file of a step is hashed by exactly one rank.
    names = sorted({*wanted, *verified})
    nbytes = sum(source.index.files.get(name, 0) for name in names)
    threads = min(len(names), useful_threads(nbytes, len(names))) or 1

    def read(name: str) -> str | None:
        return _read(source, name, wanted.get(name, ()), verified.get(name), follow_links=follow_links)

    with ThreadPoolExecutor(threads, "shardsmith-load") as pool:
        return [f"{name}: {damage}" for name, damage in zip(names, pool.map(read, names), strict=True) if damage]


def _read(
    source: DcpSource, name: str, wanted: Sequence[Wanted], record: FileRecord | None, *, follow_links: bool
) -> str | None:
    """What is wrong with a file, if it is verified."""
    try:
        # If the file is hashed, all of it is read in any case and there are no ranges to request.
        hashed = record is not None
        ranges = [] if hashed else [span for one in wanted for span in one.spans()]
        with FileStream(source.path / name, hashed=hashed, follow_links=follow_links, ranges=ranges) as file:
            are_ours = _fill(file, wanted)
            found = file.finish()
            size = file.size
    except OSError as error:
        if record is None:
            raise CheckpointError(source.path / name, f"cannot be read: {error.strerror}") from error
        return f"cannot be read: {error.strerror}"
    if record is not None and (size, found) != (record.size, record.xxh3_128):
        if size != record.size:
            return f"has {size} bytes, expected {record.size}"
        return f"has changed since it was written: XXH3-128 {found}, expected {record.xxh3_128}"
    # Only after the hash was found right: a foreign archive is read a second time by its own directory.
    if not are_ours:
        _fill_foreign(source, wanted)
    return None


@torch.no_grad()
def _fill(file: FileStream, wanted: Sequence[Wanted]) -> bool:
    """Copy what is wanted as it passes by; whether all archives are such as we write, and it was done."""
    at = 0
    while at < len(wanted):
        end = at + 1  # several boxes may want the same chunk
        while end < len(wanted) and wanted[end].stored == wanted[at].stored:
            end += 1
        if not _fill_chunk(file, wanted[at:end]):
            return False
        at = end
    return True


def _fill_chunk(file: FileStream, wanted: Sequence[Wanted]) -> bool:
    stored, dtype = wanted[0].stored, wanted[0].dtype
    chunk = stored.chunk
    if chunk.numel * dtype.itemsize > MOST_BYTES:
        return False
    layout = archive_layout(chunk.sizes, dtype)
    # An archive of ours for this shape and dtype has exactly these bytes in front. If they match, the payload is where
    # we put it and nothing has to be parsed.
    if layout.length != stored.length or file.take(stored.offset, len(layout.head)) != layout.head:
        return False
    payload = stored.offset + len(layout.head)
    for first, part in row_major_blocks(chunk.sizes, BLOCK_BYTES // dtype.itemsize):
        block = moved(part, chunk)
        # Several boxes may share a block, as tied tensors do under two keys.
        takers = [one for one in wanted if one.part.intersect(block) is not None]
        if takers:
            values = file.take_values(payload + first * dtype.itemsize, part.numel, dtype).view(part.sizes)
            for one in takers:
                one.copy(values, block)
    return True


@torch.no_grad()
def _fill_foreign(source: DcpSource, wanted: Sequence[Wanted]) -> None:
    """Of archives that others wrote, torch among them, only their directories say where the values are."""
    for one in wanted:
        for part, values in source.pieces(one.key, one.part):
            one.copy(values, part)


def deal_files(wanted_bytes: Sequence[Mapping[str, int]], sizes: Mapping[str, int]) -> list[list[str]]:
    """Return for each rank the files that it is to verify: those of which it reads most, and every file once.

    Args:
        wanted_bytes: By rank and file, how many bytes it is about to read.
        sizes: Of all files.
    """
    dealt: list[list[str]] = [[] for _ in wanted_bytes]
    load = [0] * len(wanted_bytes)
    # Large files first, so that small ones even out the load. All ranks compute the same from the same numbers.
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        counts = [wanted.get(name, 0) for wanted in wanted_bytes]
        most = max(counts)
        rank = min((rank for rank, count in enumerate(counts) if count == most), key=load.__getitem__)
        dealt[rank].append(name)
        load[rank] += sizes[name]
    return dealt
