"""``FileTensor``: a tensor that lies in a file, of which any box can be had without the rest of it."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardsmith.ground.mapped import MappedFile
from shardsmith.ground.memory import writable_memory_of


@dataclass(frozen=True, slots=True)
class FileTensor:
    """Where a dense tensor lies. Indexed by slices it gives a tensor: a view on a mapped file, else a copy."""

    file: MappedFile
    begin: int
    """Byte of the file at which its first element is."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements, none negative."""
    dtype: torch.dtype

    @classmethod
    def contiguous(cls, file: MappedFile, begin: int, shape: Sequence[int], dtype: torch.dtype) -> FileTensor:
        """Return a tensor in row-major order."""
        # The last dimension varies fastest: for (a, b, c) it is (b * c, c, 1).
        strides = [1, *itertools.accumulate(reversed(shape[1:]), operator.mul)][::-1] if shape else []
        return cls(file, begin, tuple(shape), tuple(strides), dtype)

    def __getitem__(self, box: tuple[slice, ...]) -> Tensor:
        """The elements of a box, of which every slice has a start and a stop inside the tensor.

        Raises:
            IncompleteCheckpointError: the file has been cut off.
            CheckpointError: it cannot be read.
        """
        sizes = [part.stop - part.start for part in box]
        if 0 in sizes:
            return torch.empty(0, dtype=self.dtype, device="cpu").as_strided(sizes, self.stride)
        first = sum(part.start * step for part, step in zip(box, self.stride, strict=True))
        # From the first element of the box to its last one, with those between them that are not in the box.
        span = 1 + sum((size - 1) * step for size, step in zip(sizes, self.stride, strict=True))
        values = self.file.view(self.begin + first * self.dtype.itemsize, span, self.dtype)
        return values.as_strided(sizes, self.stride)

    def whole(self) -> Tensor:
        """Return all of it."""
        return self[tuple(slice(0, size) for size in self.shape)]

    def read_bytes(self, first: int, out: Tensor) -> None:
        """Fill a contiguous CPU tensor with the bytes of a contiguous tensor from its byte ``first`` on.

        Raises as indexing.
        """
        self.file.read_into(self.begin + first, writable_memory_of(out))
