"""The boxes of a tensor that are the cells of a grid, made as they are asked for."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar, overload

import numpy as np

from shardsmith.formats.dcp.box_blocks import Layout
from shardsmith.formats.dcp.box_index_writer import ROW
from shardsmith.formats.dcp.index import StoredChunk
from shardsmith.formats.torch_files.archive_writer import MOST_BYTES, archive_layout
from shardsmith.manifest.fields import count
from shardsmith.sharding.boxes import BoxFinder
from shardsmith.tensors.tensors import Chunk, TensorSpec

T = TypeVar("T")

_GAP = 1024
"""Rows that are read although they are not wanted, if they lie between those that are."""


class IndexFile(Protocol):
    """What the boxes are read from."""

    def checked(self, read: Callable[[], T]) -> T:
        """Call a function; what it finds wrong becomes a CorruptCheckpointError."""

    def file_name(self, number: int) -> str:
        """Raises IndexError or ValueError."""

    def require_stored(self, name: str, stored: StoredChunk) -> None:
        """Raise IncompleteCheckpointError if the file does not reach so far."""

    def read(self, at: int, nbytes: int) -> bytes:
        """Read a range of the index, by its distance from the end of the head."""


class GridBoxes(Sequence[StoredChunk]):
    """The boxes of a tensor that are the cells of a grid, in row-major order. Each is made when it is asked for."""

    def __init__(self, file: IndexFile, spec: TensorSpec, layout: Layout, runs: list[list[int]], at: int) -> None:
        self._file = file
        self._spec = spec
        self._cuts = layout.cuts or []
        self._count = layout.cells
        self._runs = runs
        self._ends = [*itertools.accumulate(run[0] for run in runs)]
        self._at = at
        self._places: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, cell: int) -> StoredChunk: ...
    @overload
    def __getitem__(self, cell: slice) -> Sequence[StoredChunk]: ...
    def __getitem__(self, cell: int | slice) -> StoredChunk | Sequence[StoredChunk]:
        if isinstance(cell, slice):
            return [self[i] for i in range(self._count)[cell]]
        if not 0 <= cell < self._count:
            raise IndexError(f"box {cell} of {self._count}")
        return self._file.checked(lambda: self._stored(cell))

    def meeting(self, box: Chunk) -> Iterator[tuple[int, Chunk]]:
        """As ``BoxFinder.meeting``."""
        if not box.numel:
            return
        # The cells that meet a box are a range in each dimension, so no cell of another rank is looked at.
        spans = [cut.meeting(a, a + n) for cut, a, n in zip(self._cuts, box.offsets, box.sizes, strict=True)]
        # The product of ascending ranges is in ascending order of the cells, which _read_rows needs.
        cells = [self._number(place) for place in itertools.product(*spans)]
        self._file.checked(lambda: self._read_rows(cells))
        for cell in cells:
            common = self[cell].chunk.intersect(box)
            if common is not None:
                yield cell, common

    def _number(self, place: Sequence[int]) -> int:
        number = 0
        for i, cut in zip(place, self._cuts, strict=True):
            # Row-major: the last dimension runs fastest, as in _grid of the writer.
            number = number * cut.count + i
        return number

    def _stored(self, cell: int) -> StoredChunk:
        spans, rest = [], cell
        # The inverse of _number: the fastest dimension is the remainder of the first division.
        for cut in reversed(self._cuts):
            rest, i = divmod(rest, cut.count)
            spans.append(cut.span(i))
        box = Chunk(tuple(a for a, _ in reversed(spans)), tuple(n for _, n in reversed(spans)))
        if box.numel * self._spec.dtype.itemsize > MOST_BYTES:
            raise ValueError(f"{self._spec.name!r} has a box of {box.numel} elements")
        file, offset = self._place(cell)
        # The index has no lengths of a grid's boxes: there is a grid only where each follows from shape and dtype.
        length = archive_layout(box.sizes, self._spec.dtype).length
        stored = StoredChunk(box, self._file.file_name(file), count(offset), length)
        self._file.require_stored(self._spec.name, stored)
        return stored

    def _place(self, cell: int) -> tuple[int, int]:
        if not self._runs:
            if cell not in self._places:
                self._read_rows([cell])
            return self._places[cell]
        # _ends[i] is the cell after run i, so the position in the run counts back from there.
        i = bisect.bisect_right(self._ends, cell)
        number, file, by_file, offset, by_offset = self._runs[i]
        nth = cell - self._ends[i] + number
        return file + nth * by_file, offset + nth * by_offset

    def _read_rows(self, cells: Sequence[int]) -> None:
        """Read where cells lie, in ascending order, in as few ranges as reasonable."""
        missing = [] if self._runs else [cell for cell in cells if cell not in self._places]
        while missing:
            # How many of the missing cells lie close enough to be read as one range.
            number = next((i for i in range(1, len(missing)) if missing[i] - missing[i - 1] > _GAP), len(missing))
            first, last = missing[0], missing[number - 1]
            size = ROW.itemsize
            data = self._file.read(count(self._at) + first * size, (last - first + 1) * size)
            rows = np.frombuffer(data, dtype=ROW)
            for cell in missing[:number]:
                file, offset = rows[cell - first].tolist()
                self._places[cell] = file, offset
            missing = missing[number:]


def finder_of(chunks: Sequence[StoredChunk]) -> BoxFinder | GridBoxes:
    """Return what finds the boxes that meet one."""
    return chunks if isinstance(chunks, GridBoxes) else BoxFinder([stored.chunk for stored in chunks])
