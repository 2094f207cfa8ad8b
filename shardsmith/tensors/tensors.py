"""What every reader gives and every writer takes: specs, chunks and the ``TensorSource``.

Legend: G = global shape of a tensor, B = shape of a box in it. All offsets and sizes count elements.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from shardsmith.errors import CheckpointError, CheckpointNotFoundError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, global shape and dtype of one tensor."""

    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements of the global tensor; 1 for a 0-dim one."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the global tensor in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box in a global tensor: ``offsets[d] <= index[d] < offsets[d] + sizes[d]`` in every dimension."""

    offsets: Shape
    sizes: Shape

    @classmethod
    def whole(cls, shape: Shape) -> Chunk:
        """Return the box that is the whole tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of elements in the box; 1 for the box of a 0-dim tensor."""
        return math.prod(self.sizes)

    def intersect(self, other: Chunk) -> Chunk | None:
        """Return the box that both share, or None when it would be empty."""
        start = tuple(map(max, self.offsets, other.offsets))
        stop = tuple(min(a + m, b + n) for a, m, b, n in self._with(other))
        # Boxes of a 0-dim tensor have no dimension in which they could be apart: each is the whole tensor.
        if any(b <= a for a, b in zip(start, stop, strict=True)):
            return None
        return Chunk(start, tuple(b - a for a, b in zip(start, stop, strict=True)))

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of this box in the tensor that it is a box of."""
        return tuple(slice(a, a + n) for a, n in zip(self.offsets, self.sizes, strict=True))

    def moved(self, by: Shape) -> Chunk:
        """Return the box so many elements further in each dimension."""
        return Chunk(tuple(a + b for a, b in zip(self.offsets, by, strict=True)), self.sizes)

    def within(self, outer: Chunk) -> tuple[slice, ...]:
        """Index of this box in a tensor that holds ``outer``. This box must lie inside it."""
        return tuple(slice(a - b, a - b + m) for a, m, b, _ in self._with(outer))

    def _with(self, other: Chunk) -> Iterator[tuple[int, int, int, int]]:
        return zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)


def is_turned(one: TensorSpec, other: TensorSpec) -> bool:
    """Return whether two tensors have the same sizes in another order."""
    return one.shape != other.shape and sorted(one.shape) == sorted(other.shape)


class TensorSource(Protocol):
    """Named tensors in files, read box by box. Every format is read through this.

    Reading is thread-safe, needs no process group, and hands out views on files where those are mapped.
    """

    @property
    def path(self) -> Path:
        """What was opened."""
        ...

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """All tensors by name, in file order."""
        ...

    def pieces(self, name: str, box: Chunk) -> Iterator[tuple[Chunk, Tensor]]:
        """The stored parts of ``box``: each with its place in the global tensor and its values (CPU, shape B).

        Parts do not overlap and together cover the box. The tensors are read-only views: never write to them.
        """
        ...

    def close(self) -> None:
        """Close the files. Tensors that were read stay valid."""
        ...


def read_into(source: TensorSource, name: str, box: Chunk, out: Tensor) -> Tensor:
    """Fill ``out`` with one box of a tensor and return it.

    Args:
        source: The tensors to read from.
        name: Name of the tensor.
        box: The box to read, of shape B.
        out: CPU tensor of the box's shape B and any dtype; values are cast as ``Tensor.copy_`` does. Changed in place.

    Raises:
        CheckpointError: when the source does not cover the box.
    """
    filled = 0
    for part, values in source.pieces(name, box):
        out[part.within(box)].copy_(values)
        filled += part.numel
    # Parts do not overlap, so their sum is enough to know that nothing of ``out`` kept its old values.
    if filled != box.numel:
        raise CheckpointError(source.path, f"{name}: only {filled} of {box.numel} elements of {box} are stored")
    return out


def read_tensor(source: TensorSource, name: str) -> Tensor:
    """One whole tensor of shape G as a fresh CPU tensor of its stored dtype.

    Raises:
        CheckpointNotFoundError: when there is no such tensor.
    """
    spec = source.specs.get(name)
    if spec is None:
        raise CheckpointNotFoundError(source.path, f"has no tensor named {name!r}")
    return read_into(source, name, Chunk.whole(spec.shape), torch.empty(spec.shape, dtype=spec.dtype, device="cpu"))


def row_major_blocks(shape: Shape, max_elements: int) -> Iterator[tuple[int, Chunk]]:
    """Cut a tensor of shape G into boxes that are contiguous in row-major order.

    Yields each box with the flat index of its first element, in order; none where the tensor is empty. A box
    holds at most ``max_elements`` (> 0).
    """
    if math.prod(shape) == 0:
        return
    if math.prod(shape) <= max_elements:
        yield 0, Chunk.whole(shape)
        return
    # The outermost dimension whose rows fit: everything inside of it is taken whole, so each box is one run of memory.
    depth = next(d for d in range(len(shape)) if math.prod(shape[d + 1 :]) <= max_elements)
    tail = shape[depth + 1 :]
    # As many rows as fit; dimensions outside of ``depth`` are walked index by index.
    rows = max_elements // math.prod(tail)
    flat = 0
    for outer in itertools.product(*map(range, shape[:depth])):
        for start in range(0, shape[depth], rows):
            box = Chunk((*outer, start, *(0,) * len(tail)), (*(1,) * depth, min(rows, shape[depth] - start), *tail))
            yield flat, box
            flat += box.numel
