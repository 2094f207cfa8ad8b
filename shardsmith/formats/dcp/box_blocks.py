"""The entries in a block of ``.boxes``, read one by one; see docs/format.md."""

from __future__ import annotations

import bisect
import itertools
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
import torch

from shardsmith.formats.dcp.box_index_writer import rank_file_name
from shardsmith.formats.dcp.index import require_path
from shardsmith.ground.json_budget import require_json_budget
from shardsmith.manifest.fields import count, known_dtype, shape, typed
from shardsmith.tensors.checkpoint_keys import KeyPath
from shardsmith.tensors.tensors import Shape

T = TypeVar("T")

_MAX_DIMS = 64


@dataclass(slots=True)
class Layout:
    """Dtype and shape of tensors, and the grid of their boxes."""

    shape: Shape
    dtype: torch.dtype
    cuts: list[Cuts] | None
    """By dimension; None if the boxes are no grid."""

    @property
    def cells(self) -> int:
        found = 1
        for cut in self.cuts or ():
            found *= cut.count
        return found


class Cuts:
    """The cuts along one dimension: sizes, each repeated so often."""

    def __init__(self, pairs: Any, whole: int) -> None:
        self.sizes = [count(size) for size, _ in typed(pairs, list)]
        repeats = [count(number) for _, number in pairs]
        # Parallel prefix sums, by pair: the first cell that has this size, and the element at which that cell begins.
        self.first = [0, *itertools.accumulate(repeats)]
        self.starts = [0, *itertools.accumulate(a * b for a, b in zip(self.sizes, repeats, strict=True))]
        self.count = self.first[-1]
        # A size of zero would be a division by zero in _at, and cells that are empty.
        if 0 in self.sizes or 0 in repeats or self.starts[-1] != whole:
            raise ValueError(f"cuts {pairs!r:.100} of {whole} elements")

    def span(self, cell: int) -> tuple[int, int]:
        """Where a cell begins, and its size."""
        i = bisect.bisect_right(self.first, cell) - 1
        return self.starts[i] + (cell - self.first[i]) * self.sizes[i], self.sizes[i]

    def meeting(self, begin: int, end: int) -> range:
        """The cells that share something with a range that is not empty."""
        return range(self._at(begin), self._at(end - 1) + 1)

    def _at(self, element: int) -> int:
        # The element is in the stretch i of cells of one size, so a division finds its cell.
        i = bisect.bisect_right(self.starts, element) - 1
        return self.first[i] + (element - self.starts[i]) // self.sizes[i]


class Rows(NamedTuple):
    """What the numbers of entries are, as lists: single elements of arrays take long."""

    paths: list[int]
    """How the path follows from the key."""
    layouts: list[int]
    at: list[int]
    counts: list[int]


@dataclass(slots=True)
class Block:
    """Entries of one kind of keys."""

    names: list[str]
    paths: list[Any]
    layouts: list[Any]
    rows: Rows
    """One of each by entry."""
    runs: Any
    """(runs, 5) int64: count, file, step, offset, step."""
    numbers: dict[str, int]
    known: dict[int, Layout] = field(default_factory=dict)

    @classmethod
    def parse(cls, data: bytes) -> Block:
        """Raises ValueError, KeyError, TypeError or struct.error."""
        (length,) = struct.unpack_from("<Q", data)
        text = data[8 : 8 + length]
        require_json_budget(text)
        content = json.loads(text)
        names = typed(content["names"], list)
        numbers = {typed(name, str): i for i, name in enumerate(names)}
        # Four numbers by key, then five by run; the offset need not be a multiple of 8.
        values = np.frombuffer(data, dtype="<i8", offset=8 + length)
        if len(numbers) != len(names) or len(values) != 4 * len(names) + 5 * count(content["runs"]):
            raise ValueError("keys are there twice, or rows are missing")
        # The file has the four numbers of a key together; transposed, each kind is one list.
        rows, runs = Rows(*values[: 4 * len(names)].reshape(-1, 4).T.tolist()), values[4 * len(names) :].reshape(-1, 5)
        return cls(names, typed(content["paths"], list), typed(content["layouts"], list), rows, runs, numbers)

    def layout(self, number: int) -> Layout:
        """Raises ValueError, IndexError or TypeError."""
        if number not in self.known:
            dtype, sizes, grid = self.layouts[number]
            whole = shape(sizes)
            if len(whole) > _MAX_DIMS:
                raise ValueError(f"{len(whole)} dimensions")
            cuts = None if grid is None else [Cuts(p, n) for p, n in zip(grid, whole, strict=True)]
            self.known[number] = Layout(whole, getattr(torch, known_dtype(dtype)), cuts)
        return self.known[number]

    def path(self, i: int) -> KeyPath:
        """Raises ValueError, IndexError or TypeError."""
        code = self.rows.paths[i]
        if code >= 0:
            return tuple(self.names[i].split(".", code))
        return require_path(typed(self.paths[-code - 1], list))


class FilesOfRanks(Sequence[str]):
    """The names of the files of so many ranks."""

    def __init__(self, number: int) -> None:
        self._number = count(number)

    def __len__(self) -> int:
        return self._number

    @overload
    def __getitem__(self, rank: int) -> str: ...
    @overload
    def __getitem__(self, rank: slice) -> Sequence[str]: ...
    def __getitem__(self, rank: int | slice) -> str | Sequence[str]:
        if isinstance(rank, slice):
            return [self[i] for i in range(self._number)[rank]]
        if not 0 <= rank < self._number:
            raise IndexError(f"file {rank} of {self._number}")
        return rank_file_name(rank)


class Entries(Mapping[str, T]):
    """What is found by key."""

    def __init__(
        self, find: Callable[[str], T | None], has: Callable[[str], bool], names: Callable[[], Iterator[str]]
    ) -> None:
        self._find = find
        self._has = has
        self._names = names

    @overload
    def get(self, key: str, /) -> T | None: ...
    @overload
    def get(self, key: str, /, default: Any) -> Any: ...
    def get(self, key: str, /, default: Any = None) -> Any:
        """As of any mapping, without an exception for what is not there."""
        found = self._find(key)
        return default if found is None else found

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._has(key)

    def __getitem__(self, key: str) -> T:
        found = self._find(key)
        if found is None:
            raise KeyError(key)
        return found

    def __iter__(self) -> Iterator[str]:
        return self._names()

    def __len__(self) -> int:
        return sum(1 for _ in self._names())
