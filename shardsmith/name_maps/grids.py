"""Regular grids of elements in a tensor: what slicing, permuting and reshaping leave of it, however it is sharded.

``w.view(heads, 2, d // 2, dim).transpose(1, 2)`` has the elements of ``w`` in another order, but still at regular
steps: it is a grid with four axes, three of which run along the rows of ``w``. A shard of ``w`` has a few boxes of the
grid, each a view on the shard's memory.

Legend: a grid's own shape is that of its axes; a "part" is a box in it, as opposed to a box in the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from shardsmith.tensors.tensors import Chunk, Shape

Range = tuple[int, int]
"""First index and count."""


@dataclass(frozen=True, slots=True)
class Axis:
    """``size`` elements along one dimension of a tensor, ``step`` apart."""

    dim: int
    step: int
    size: int


@dataclass(frozen=True, slots=True)
class Grid:
    """The elements ``start + i * axes[0].step + j * axes[1].step + ...``, each step along its axis' dimension.

    Of the axes along one dimension each steps over all that the finer ones reach, so no element is there twice.
    """

    start: Shape
    """Of the tensor's dimensions."""
    axes: tuple[Axis, ...]
    """None of size 1."""

    @classmethod
    def whole(cls, shape: Shape) -> Self:
        """Return all of a tensor, an axis for each dimension that has more than one index."""
        return cls((0,) * len(shape), tuple(Axis(dim, 1, size) for dim, size in enumerate(shape) if size != 1))

    @property
    def shape(self) -> Shape:
        """Of the grid itself."""
        return tuple(axis.size for axis in self.axes)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def fits(self, shape: Shape) -> bool:
        """Return whether a tensor of this shape has all its elements, and none of them is there twice."""
        if len(self.start) != len(shape) or any(axis.size < 0 or axis.step < 1 for axis in self.axes):
            return False
        if not self.numel:
            return True
        # An index into ``start`` by a dimension that is not there would raise in ``cover``.
        if not {axis.dim for axis in self.axes} <= set(range(len(shape))):
            return False
        cover = self.cover(Chunk.whole(self.shape))
        # The first and the last element lie inside, and all others lie between them.
        inside = Chunk.whole(shape).intersect(cover) == cover
        return inside and all(
            wide.step >= _reach(finer) for _, axes in self.along_dims() for wide, *finer in _tails(axes)
        )

    def along_dims(self) -> list[tuple[int, list[Axis]]]:
        """For each of the tensor's dimensions the axes along it, widest step first."""
        return [(dim, [self.axes[i] for i in self._along(dim)]) for dim in range(len(self.start))]

    def cover(self, part: Chunk) -> Chunk:
        """Return the smallest box of the tensor that has all of a part that is not empty."""
        offsets, sizes = list(self.start), [1] * len(self.start)
        for axis, first, count in zip(self.axes, part.offsets, part.sizes, strict=True):
            offsets[axis.dim] += first * axis.step
            # Several axes along one dimension add up: each reaches count - 1 steps from the first element.
            sizes[axis.dim] += (count - 1) * axis.step
        return Chunk(tuple(offsets), tuple(sizes))

    def cut(self, box: Chunk) -> list[Chunk]:
        """Return the parts that a box of the tensor has: few, apart from each other, and all that there is."""
        if not self.numel or not box.numel:
            return []
        found: list[tuple[list[int], list[int]]] = [([0] * len(self.axes), [0] * len(self.axes))]
        for dim, (start, low, size) in enumerate(zip(self.start, box.offsets, box.sizes, strict=True)):
            places = self._along(dim)
            ranges = list(_ranges([self.axes[i] for i in places], low - start, low + size - start))
            # The cartesian product over the dimensions: each range of one dimension with each of the others.
            found = [_with(part, places, chosen) for part in found for chosen in ranges]
        return [Chunk(tuple(offsets), tuple(sizes)) for offsets, sizes in found]

    def view(self, values: Tensor, box: Chunk, part: Chunk) -> Tensor:
        """Return the values of a part that is not empty, out of those of a box that has it. Shares memory.

        Args:
            values: Of shape ``box.sizes``, with any strides.
            box: The box that has the values.
            part: A box inside it.

        Returns:
            Of shape ``part.sizes``.
        """
        strides = values.stride()
        place = values.storage_offset()
        for start, offset, stride in zip(self.start, box.offsets, strides, strict=True):
            # May point outside of the box for now; the first element of the part brings it back inside.
            place += (start - offset) * stride
        steps = []
        for axis, first in zip(self.axes, part.offsets, strict=True):
            steps.append(axis.step * strides[axis.dim])
            place += first * steps[-1]
        # as_strided and no indexing: several axes along one dimension are no slice of it.
        return values.as_strided(part.sizes, steps, place)

    def boxes(self, part: Chunk) -> Iterator[Chunk]:
        """Yield the few parts of a part of which each is all of its ``cover``, as ``as_box`` takes them."""
        place = self._first_gap(part)
        if place is None:
            yield part
            return
        # One index of the axis with gaps at a time; the finer axes inside of it are then looked at again.
        sizes = (*part.sizes[:place], 1, *part.sizes[place + 1 :])
        for i in range(part.sizes[place]):
            step = (*(0,) * place, i, *(0,) * (len(sizes) - place - 1))
            yield from self.boxes(Chunk(part.offsets, sizes).moved(step))

    def as_box(self, values: Tensor, part: Chunk) -> Tensor:
        """Return the values of a part that is all of its ``cover``, in the cover's shape: a view, or else a copy."""
        # Dimension by dimension, widest step first: row-major order of the cover.
        order = [i for dim in range(len(self.start)) for i in self._along(dim)]
        return values.permute(order).reshape(self.cover(part).sizes)

    def _first_gap(self, part: Chunk) -> int | None:
        """The axis whose steps, in a part, leave out elements between them; None if the part is a box."""
        for dim in range(len(self.start)):
            reach = 1
            for place in reversed(self._along(dim)):
                if part.sizes[place] > 1 and self.axes[place].step != reach:
                    return place
                reach *= part.sizes[place]
        return None

    def _along(self, dim: int) -> list[int]:
        places = [i for i, axis in enumerate(self.axes) if axis.dim == dim]
        return sorted(places, key=lambda i: -self.axes[i].step) if len(places) > 1 else places


def _with(
    part: tuple[list[int], list[int]], places: list[int], ranges: tuple[Range, ...]
) -> tuple[list[int], list[int]]:
    offsets, sizes = part[0].copy(), part[1].copy()
    for place, (first, count) in zip(places, ranges, strict=True):
        offsets[place], sizes[place] = first, count
    return offsets, sizes


def _reach(axes: Sequence[Axis]) -> int:
    """How far from the first element the one after the last would be."""
    return 1 + sum((axis.size - 1) * axis.step for axis in axes)


def _tails(axes: Sequence[Axis]) -> Iterator[Sequence[Axis]]:
    return (axes[i:] for i in range(len(axes)))


def _ranges(axes: Sequence[Axis], low: int, high: int) -> Iterator[tuple[Range, ...]]:
    """What axes along one dimension, widest step first, have between two places: a range of each axis, several times.

    Along the widest axis there are steps with everything in between, and at both ends perhaps one with some of it.
    """
    if not axes:
        if low <= 0 < high:
            yield ()
        return
    wide, finer = axes[0], axes[1:]
    step, reach = wide.step, _reach(finer)
    # The steps of the widest axis of which anything lies between low and high; full to after are those with everything.
    first, last = max(0, (low - reach) // step + 1), min(wide.size, -(-high // step))
    full, after = max(first, -(-low // step)), min(last, (high - reach) // step + 1)
    # No step is complete: all of them are partial, in one run.
    if full >= after:
        full = after = last
    for i in range(first, full):
        yield from (((i, 1), *rest) for rest in _ranges(finer, low - i * step, high - i * step))
    if full < after:
        yield ((full, after - full), *((0, axis.size) for axis in finer))
    for i in range(after, last):
        yield from (((i, 1), *rest) for rest in _ranges(finer, low - i * step, high - i * step))
