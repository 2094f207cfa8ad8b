"""What the files of all ranks are together: the plan of each, the index, and the digests of whole tensors."""

from __future__ import annotations

import base64
import contextlib
import functools
import itertools
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash

from shardsmith.formats.dcp.box_index_writer import rank_file_name
from shardsmith.formats.dcp.cuts import Cuts, CutTensor
from shardsmith.formats.dcp.index import DcpEntry, DcpIndex
from shardsmith.formats.dcp.index_writer import write_indexes
from shardsmith.formats.dcp.rank_file import Piece, RankFile, RankFileWritten, begins, moved, split
from shardsmith.formats.dcp.shard_files import Place
from shardsmith.formats.describe import Measured
from shardsmith.ground import layout
from shardsmith.ground.commit import AnyAttempt, attempt_directory, writing
from shardsmith.ground.new_file import new_file
from shardsmith.manifest.metadata import FileRecord
from shardsmith.run_state.described import RankHolds, entries_in_all
from shardsmith.run_state.held import Entry, items
from shardsmith.run_state.piece_numbers import PieceNumbers, add_digests
from shardsmith.run_state.weight_files import Placed
from shardsmith.sharding.holding import unpack_flags
from shardsmith.tensors.digest import Digest
from shardsmith.tensors.tensors import Chunk, Shape, TensorSpec

NOWHERE = Placed()
Content = bytes | Iterable[bytes]
"""Of a file, as a whole or in parts that are made when they are asked for, once."""
_MOST_KEPT = 1 << 23
"""Boxes of an index that is kept from save to save: some 130 bytes each, and twice that while it is made."""
_BOX = np.dtype([("file", np.int32), ("offset", np.int64), ("box", np.int32), ("length", np.uint32)])
"""Where the archive of a box lies, which box it is, and the length of the archive in bytes."""


@dataclass(frozen=True)
class OwnFile:
    """What one rank writes, and where in what it holds the contents are."""

    weights: tuple[Piece, ...]
    """Pieces for weight files."""
    file: RankFile
    tensors: list[tuple[int, int, Chunk | None]]
    """By piece of weights, then of the file: entry, position in its values, and which part of that; None is all."""
    objects: list[int]
    """Entries."""

    @classmethod
    def of(
        cls, rank: int, entries: Sequence[Entry], chosen: Sequence[tuple[int, int]], placed: Placed = NOWHERE
    ) -> Self:
        """By what a rank holds, which of it it writes, and what of that is for weight files."""
        # Boxes that all ranks have lie first, and so, mostly, at one place in every file: .boxes then says it once.
        chosen = sorted(chosen, key=lambda item: _is_whole(entries[item[0]], item[1]))
        found: tuple[list[Piece], list[Piece]] = [], []
        tensors: tuple[list[tuple[int, int, Chunk | None]], list[tuple[int, int, Chunk | None]]] = [], []
        for i, position in chosen:
            entry = entries[i]
            if entry.shape is None or entry.dtype is None or entry.key in placed.tied:
                continue
            # As an index, False is 0, for weight files, and True is 1, for the rank's own file.
            box, where = entry.boxes[position], entry.key not in placed.written
            for part in split(box, entry.dtype):
                found[where].append(Piece(entry.key, entry.shape, entry.dtype, moved(part, box)))
                tensors[where].append((i, position, None if part.sizes == box.sizes else part))
        objects = [i for i, _ in chosen if entries[i].shape is None]
        keys = tuple(entries[i].key for i in objects)
        weights, pieces = map(tuple, found)
        return cls(weights, RankFile(rank_file_name(rank), pieces, keys), [*tensors[0], *tensors[1]], objects)

    @functools.cached_property
    def sizes(self) -> list[Shape]:
        """Shapes of the pieces."""
        return [piece.box.sizes for piece in self.pieces]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All that it writes of tensors."""
        return self.weights + self.file.pieces


def to_receipt(written: RankFileWritten, weights: Sequence[Digest] = ()) -> dict[str, Any]:
    """Return what a rank tells of its file, as values that survive JSON; the order of everything is known.

    ``weights`` are the digests of the pieces that are in weight files.
    """
    digests = np.array([(d.total, d.weighted) for d in (*weights, *written.digests)], dtype=np.uint64)
    lengths = np.array(written.object_lengths, dtype=np.uint32)
    packed = _text(zlib.compress(lengths.tobytes(), 1))  # most are equal
    return {"file": asdict(written.record), "digests": _text(digests.tobytes()), "object_lengths": packed}


class WholeDirectory:
    """All files of a save. Rank 0 keeps it from save to save; no communication."""

    def __init__(self, held: Sequence[RankHolds], writes: Sequence[str], placed: Placed = NOWHERE) -> None:
        """What each rank holds, for each of its boxes whether it writes it, and what of that is in weight files."""
        self._held = held
        self._writes = writes
        self._where = placed
        self._placed = placed.written | placed.tied
        entries = entries_in_all(held)
        self._containers = {key: entry.path for key, entry in entries.items()}
        self.specs = {
            key: TensorSpec(key, entry.shape, entry.dtype)
            for key, entry in entries.items()
            if entry.shape is not None and entry.dtype is not None
        }
        self._numbers = PieceNumbers([*self.specs.values()], placed)
        self._last: tuple[list[str], str, dict[str, bytes]] | None = None

    @property
    def file_names(self) -> list[str]:
        """Names of the files, by rank."""
        return [rank_file_name(one.rank) for one in self._held]

    def file(self, rank: int) -> RankFile:
        """Return the plan of a rank's file. It is made anew, since together they have ranks times tensors."""
        entries = self._held[rank].entries()
        found = [*items(entries)]
        chosen = itertools.compress(found, unpack_flags(self._writes[rank], len(found)))
        return OwnFile.of(rank, entries, [*chosen], self._where).file

    def measured(self, receipts: Sequence[Mapping[str, Any]]) -> Measured:
        """Files and digests by what ``to_receipt`` gave on each rank."""
        sums = np.zeros((len(self.specs), 2), dtype=np.uint64)
        files = {}
        for name, held, writes, receipt in zip(self.file_names, self._held, self._writes, receipts, strict=True):
            digests = np.frombuffer(base64.b64decode(receipt["digests"]), dtype=np.uint64).reshape(-1, 2)
            # The digest of a tensor is the sum of those of its pieces, mod 2**64.
            add_digests(sums, self._numbers.of(held, writes), digests)
            files[name] = FileRecord(**receipt["file"])
        return Measured(files, {key: Digest(*row) for key, row in zip(self.specs, sums.tolist(), strict=True)})

    def indexes(self, receipts: Sequence[Mapping[str, Any]], attempt: str) -> dict[str, Content]:
        """Return the content of ``.metadata`` and ``.boxes``, by name.

        It differs from save to save by little, so the last one is kept and patched, unless it is very large.
        """
        lengths = [receipt["object_lengths"] for receipt in receipts]
        if self._last is not None and self._last[:1] == (lengths,):
            # The same lengths: only the id of the attempt is another one.
            _, before, contents = self._last
            content = contents[layout.DCP_INDEX_FILE]
            # Only if nothing else in it looks like the id of the attempt.
            if content.count(before.encode()) == 1 and len(before) == len(attempt):
                return {**contents, layout.DCP_INDEX_FILE: content.replace(before.encode(), attempt.encode())}
        tensors, objects = self._placed_boxes(lengths)
        parts = write_indexes(
            tensors,
            files=self.file_names,
            containers={key: path for key, path in self._containers.items() if key not in self._placed},
            attempt=attempt,
            objects=objects,
        )
        if sum(len(tensor.files) for tensor in tensors.values()) > _MOST_KEPT:
            self._last = None
            return {**parts}
        contents = {name: as_bytes(one) for name, one in parts.items()}
        self._last = lengths, attempt, contents
        return {**contents}

    def _placed_boxes(self, object_lengths: Sequence[str]) -> tuple[dict[str, CutTensor], dict[str, Place]]:
        """Where each box lies, and each value that is no tensor, by key.

        There are ranks times tensors of them: 20 bytes each, and no object.
        """
        cuts, specs, names = Cuts(), [*self.specs.values()], self.file_names
        counts = np.zeros(len(specs), dtype=np.int64)
        for held, writes in zip(self._held, self._writes, strict=True):
            pieces = self._numbers.in_file(held, writes, cuts.number)
            counts += np.bincount(pieces.numbers, minlength=len(specs))
        ends = np.cumsum(counts)
        rows = np.empty(int(counts.sum()), dtype=_BOX)
        # Of each tensor the next row that is free. The boxes of a tensor are in the order of the ranks.
        free = ends - counts
        objects: dict[str, Place] = {}
        for rank, (held, writes, packed) in enumerate(zip(self._held, self._writes, object_lengths, strict=True)):
            numbers, boxes, lengths, keys = self._numbers.in_file(held, writes, cuts.number)
            of_objects = np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype=np.uint32)
            offsets = begins(np.concatenate([lengths, of_objects]))
            order = np.argsort(numbers, kind="stable")
            tensors = numbers[order]
            # A rank may have several boxes of one tensor: behind the first of them, as many further.
            at = free[tensors] + np.arange(len(tensors)) - np.searchsorted(tensors, tensors)
            rows["file"][at], rows["offset"][at] = rank, offsets[: len(lengths)][order]
            rows["box"][at], rows["length"][at] = boxes[order], lengths[order]
            free += np.bincount(numbers, minlength=len(specs))
            places = zip(offsets[len(lengths) :].tolist(), of_objects.tolist(), strict=True)
            objects |= {key: Place(names[rank], *place) for key, place in zip(keys, places, strict=True)}
        found = {}
        for spec, end, count in zip(specs, ends.tolist(), counts.tolist(), strict=True):
            if spec.name not in self._placed:
                mine = rows[end - count : end]
                cut = cuts.cut(spec.dtype, spec.shape, mine["box"], mine["length"])
                found[spec.name] = CutTensor(cut, mine["file"], mine["offset"])
        return found, objects

    def contents(self, directory: Path) -> DcpIndex:
        """Return what a reader of the index finds in it, but for where it lies."""
        tensors = {key: DcpEntry(spec, ()) for key, spec in self.specs.items()}
        return DcpIndex(directory, tensors, {}, self._containers, {})


def _is_whole(entry: Entry, position: int) -> bool:
    """Whether a box is all of a tensor, which one rank writes; what is no tensor is so, too."""
    return entry.shape is None or entry.boxes[position].sizes == entry.shape


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def write_content(attempt: AnyAttempt, name: str, content: Content) -> FileRecord:
    """Write a file beside those of the ranks, durable in itself, and each part of it before the next one is made.

    Raises WriteError, StorageError.
    """
    if isinstance(content, bytes):
        size = attempt.write(name, content)
        return FileRecord(size=size, xxh3_128=xxhash.xxh3_128_hexdigest(content))
    path, size, digest = attempt_directory(attempt.target, attempt.id) / name, 0, xxhash.xxh3_128()
    with writing(path, "write"), contextlib.closing(new_file(path)) as file:
        for part in content:
            file.write(memoryview(part))
            digest.update(part)
            size += len(part)
        file.finish()
    return FileRecord(size=size, xxh3_128=digest.hexdigest())


def as_bytes(content: Content) -> bytes:
    """Return the whole content of a file."""
    return content if isinstance(content, bytes) else b"".join(content)
