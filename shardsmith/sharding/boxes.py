"""Boxes that cut up a tensor: whether two of them overlap, and which of them meet a given box."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

from shardsmith.tensors.tensors import Chunk, Shape

_MAX_COMPARISONS = 128  # for each box, on average: enough for any sharding of a few thousand ranks


class IrregularBoxesError(ValueError):
    """There are so many boxes, and so irregular ones, that comparing them would take minutes."""


class BoxFinder:
    """Finds the boxes that meet a given one without looking at all of them.

    They are sorted along the dimension that most of the cuts go through.
    """

    def __init__(self, boxes: Sequence[Chunk]) -> None:
        """Sort the boxes, which have one number of dimensions and are not empty."""
        self._boxes = boxes
        self._dim = _busiest_dim(boxes)
        self._order = sorted(range(len(boxes)), key=self._start)
        self._starts = [self._start(i) for i in self._order]
        self._longest = max((self._span(box)[1] for box in boxes), default=0)

    def meeting(self, box: Chunk) -> Iterator[tuple[int, Chunk]]:
        """Position and common part of each of the boxes that shares something with ``box``."""
        start, length = self._span(box)
        # A box that begins a longest length or more before this one ends before it begins.
        first = bisect_right(self._starts, start - self._longest)
        last = bisect_left(self._starts, start + length)
        for i in self._order[first:last]:
            common = self._boxes[i].intersect(box)
            if common is not None:
                yield i, common

    def _start(self, i: int) -> int:
        return self._span(self._boxes[i])[0]

    def _span(self, box: Chunk) -> tuple[int, int]:
        return (box.offsets[self._dim], box.sizes[self._dim]) if box.sizes else (0, 1)


def find_overlap(boxes: Sequence[Chunk]) -> tuple[Chunk, Chunk] | None:
    """Two of the boxes that share something, or None. The boxes differ, are not empty, and have equal dimensions.

    Raises:
        IrregularBoxesError: when finding out would take too long.
    """
    if len(boxes) < 2 or _is_grid(boxes):
        return None
    dim = _busiest_dim(boxes)
    comparisons = 0
    near: list[Chunk] = []  # boxes that reach beyond the start of the current one
    # A sweep along one dimension: only boxes that have begun and not yet ended can meet the current one.
    for box in sorted(boxes, key=lambda b: b.offsets[dim]):
        near = [other for other in near if other.offsets[dim] + other.sizes[dim] > box.offsets[dim]]
        # Boxes of a stranger's file may all overlap in this dimension: then each is compared with all others.
        comparisons += len(near)
        if comparisons > _MAX_COMPARISONS * len(boxes):
            raise IrregularBoxesError(f"{len(boxes)} boxes")
        for other in near:
            if box.intersect(other) is not None:
                return other, box
        near.append(box)
    return None


def why_not_whole(boxes: Sequence[Chunk], shape: Shape) -> str | None:
    """What is wrong with boxes that different ranks hold, if they are not together a tensor; each box once.

    Raises:
        IrregularBoxesError: as ``find_overlap``.
    """
    # Overlaps are looked for first: with them a sum of elements says nothing about holes.
    if overlap := find_overlap(boxes):
        return f"ranks hold {overlap[0]} and {overlap[1]}, which overlap"
    absent = math.prod(shape) - sum(box.numel for box in boxes)
    return f"{absent} of {math.prod(shape)} elements are on no rank" if absent else None


def _is_grid(boxes: Sequence[Chunk]) -> bool:
    """Whether they are cells of one grid, so that different ones are apart. The usual case, told without comparing."""
    for dim in range(len(boxes[0].sizes)):
        # Distinct spans do not overlap in any dimension: two boxes that differ do so in one, and are apart there.
        spans = sorted({(box.offsets[dim], box.sizes[dim]) for box in boxes})
        if any(start + length > later for (start, length), (later, _) in itertools.pairwise(spans)):
            return False
    return True


def _busiest_dim(boxes: Sequence[Chunk]) -> int:
    dims = len(boxes[0].offsets) if boxes else 0
    return max(range(dims), default=0, key=lambda dim: len({box.offsets[dim] for box in boxes}))
