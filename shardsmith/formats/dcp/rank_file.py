"""The one file that a rank writes in a save: which archives are in it, and where, is known before it is written.

So the rank that writes the index needs to hear nothing but what the values decide: digests, and the sizes of archives
that are not of tensors.
"""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardsmith.formats.dcp.archive_file import ArchiveFile
from shardsmith.formats.dcp.shard_files import Place
from shardsmith.formats.torch_files.archive_writer import ALIGNMENT, archive_layout
from shardsmith.ground.commit import writing
from shardsmith.ground.memory import memory_of
from shardsmith.manifest.metadata import FileRecord
from shardsmith.tensors.digest import Digest, digest_box, digest_run, first_of_run
from shardsmith.tensors.tensors import Chunk, Shape, row_major_blocks

MOST_BYTES = 1 << 30
"""Of a tensor in one archive; longer boxes become several."""
_BLOCK_BYTES = 1 << 20
"""Small enough to stay in cache from the digest to the write."""
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor that becomes one archive."""

    key: str
    shape: Shape
    """Global shape."""
    dtype: torch.dtype
    box: Chunk


@dataclass(frozen=True, slots=True)
class RankFile:
    """What is in a rank's file: tensors first, then the values that are none."""

    name: str
    pieces: tuple[Piece, ...]
    objects: tuple[str, ...]
    """Keys."""

    def places(self, object_lengths: Sequence[int]) -> Iterator[Place]:
        """Yield where each archive lies, in that order. ``object_lengths``: sizes in bytes of those of ``objects``."""
        lengths = [archive_layout(piece.box.sizes, piece.dtype).length for piece in self.pieces]
        lengths += object_lengths
        for start, length in zip(begins(np.array(lengths, dtype=np.int64)).tolist(), lengths, strict=True):
            yield Place(self.name, start, length)


@dataclass(frozen=True, slots=True)
class RankFileWritten:
    """What a rank finds out by writing its file."""

    record: FileRecord
    digests: list[Digest]
    """By piece."""
    object_lengths: list[int]


def begins(lengths: np.ndarray) -> np.ndarray:
    """Return where archives of these lengths lie one after the other, in bytes.

    Must be what ArchiveFile does: the index is made from these numbers, and not from what was written.
    """
    aligned = -(-lengths // ALIGNMENT) * ALIGNMENT
    found: np.ndarray = np.cumsum(aligned) - aligned
    return found


def split(box: Chunk, dtype: torch.dtype) -> Iterator[Chunk]:
    """The parts of a box, in it, that become an archive each."""
    if box.numel * dtype.itemsize <= MOST_BYTES:
        yield Chunk.whole(box.sizes)
        return
    for _, part in row_major_blocks(box.sizes, MOST_BYTES // dtype.itemsize):
        yield part


def moved(part: Chunk, outer: Chunk) -> Chunk:
    """Return a box in a box as a box of the tensor."""
    return Chunk(tuple(a + b for a, b in zip(part.offsets, outer.offsets, strict=True)), part.sizes)


def encode(value: Any) -> bytes:
    """Return a value that is no tensor as torch.distributed.checkpoint stores it."""
    is_plain = type(value) in _PLAIN or (type(value) is tuple and all(type(item) in _PLAIN for item in value))
    # Pickled and not the value itself as the key of the cache: 1, 1.0 and True are equal and are saved differently.
    return _encode_plain(pickle.dumps(value)) if is_plain else _encode(value)


def write_rank_file(
    file: RankFile, values: Iterable[Tensor], objects: Iterable[bytes], directory: Path
) -> RankFileWritten:
    """Write and fsync a file. Any thread; no communication.

    Args:
        file: Name and planned content.
        values: Of each piece, on any device; not changed.
        objects: As ``encode`` gave them.
        directory: Where to write it.

    Raises:
        WriteError: it could not be written.
    """
    # Without the objects, which are small: an upload only chooses the size of its parts by this number.
    path = directory / file.name
    expected = sum(archive_layout(piece.box.sizes, piece.dtype).length for piece in file.pieces)
    with (
        # Entered first and so left last: no fsync is running when the file is closed.
        ThreadPoolExecutor(1, "shardsmith-sync") as syncing,
        writing(path, "write"),
        ArchiveFile(path, syncing, expected) as out,
    ):
        digests = [_write_piece(out, piece, held) for piece, held in zip(file.pieces, values, strict=True)]
        lengths = []
        for data in objects:
            out.write_archive(data)
            lengths.append(len(data))
        return RankFileWritten(out.finish(), digests, lengths)


def _write_piece(file: ArchiveFile, piece: Piece, held: Tensor) -> Digest:
    archive = archive_layout(piece.box.sizes, piece.dtype)
    file.begin(archive)
    # The file has the values and no flags: conjugation and negation are carried out, and a view is laid out in
    # row-major order.
    values = held.detach().resolve_conj().resolve_neg().cpu().contiguous()
    memory = memory_of(values)
    # None if the box is not one run of the global tensor, such as a column shard: the digest weighs elements by where
    # they lie in the global tensor.
    first = first_of_run(piece.box, piece.shape)
    if first is not None:
        digest = digest_run(values, first, lambda begin, end: file.write_payload(memory[begin:end]))
    else:
        digest = _write_rows(file, piece, values, memory)
    file.end(archive)
    return digest


def _write_rows(file: ArchiveFile, piece: Piece, values: Tensor, memory: memoryview) -> Digest:
    """Write values that do not lie side by side in the global tensor."""
    digest = Digest()
    size = piece.dtype.itemsize
    for first, part in row_major_blocks(piece.box.sizes, _BLOCK_BYTES // size):
        digest += digest_box(values[part.within(Chunk.whole(piece.box.sizes))], moved(part, piece.box), piece.shape)
        file.write_payload(memory[first * size : (first + part.numel) * size])
    return digest


@functools.lru_cache(maxsize=4096)
def _encode_plain(pickled: bytes) -> bytes:
    """Of the values of an optimizer's groups there are thousands, and few different ones."""
    return _encode(pickle.loads(pickled))


def _encode(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()
