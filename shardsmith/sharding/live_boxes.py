"""The share of one rank in an export of live weights: what it holds, what it is to write, and a staged copy of that."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardsmith.sharding.local_boxes import local_boxes
from shardsmith.tensors.device_copy import copy_to_host
from shardsmith.tensors.tensors import Chunk, Shape


@dataclass(frozen=True, slots=True)
class LiveBox:
    """A box of a global tensor, with this rank's values."""

    name: str
    shape: Shape
    """That of the tensor, or one of more dimensions with the same elements in the same row-major order."""
    box: Chunk
    """In a tensor of this shape."""
    values: Tensor
    """Shape ``box.sizes``; live memory on the model's device, or staged on the CPU."""


def held_boxes(tensors: Mapping[str, Tensor]) -> list[LiveBox]:
    """Return all that this rank holds, in the order of the tensors. No communication; shares memory."""
    return [
        LiveBox(name, tuple(tensor.shape), box, values)
        for name, tensor in tensors.items()
        for box, values in local_boxes(tensor)
    ]


def address_of(tensor: Tensor) -> int:
    """Return the address of the memory that a tensor of one rank, or another that it is a view of, lies in."""
    return tensor.untyped_storage().data_ptr()


class StagingBuffer:
    """Memory on the CPU that stagings use again and again. Grows to the largest that it was needed for.

    Attributes:
        has_room: Whether the hosts were found to have memory for it, by all ranks together.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.has_room = False
        self._wanted: list[tuple[bool, torch.Size, torch.dtype]] = []  # of the last call, as are the places
        self._places: list[Tensor] = []

    def growth(self, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> int:
        """How many more bytes of memory a ``copy`` of these would take."""
        size = _ends(tensors, dtypes)[-1]
        if any(tensor.device.type != "cpu" for tensor in tensors):
            size = 1 << (size - 1).bit_length() if size else 0  # as torch takes pinned memory
        return max(0, size - len(self._memory))

    @functools.cached_property
    def beside(self) -> StagingBuffer:
        """Another one, for a copy that is made while this one is read."""
        return StagingBuffer()

    def copy(self, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """Return copies of tensors, cast to these dtypes. No communication.

        From an accelerator through a window there, into pinned memory; only the host waits. The copies are valid until
        the next call.
        """
        copies = self.places(tensors, dtypes)
        copy_into(tensors, copies)
        return copies

    def warm(self, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> None:
        """Make the memory that a ``copy`` of these takes, and touch it, by which the system really gives it."""
        before = self._memory
        self.places(tensors, dtypes)
        if self._memory is not before:
            self._memory.fill_(0)

    def places(self, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """Return where the copies are to go, valid as those of ``copy``. Nothing is copied."""
        pinned = any(tensor.device.type != "cpu" for tensor in tensors)
        wanted = [(pinned, tensor.shape, dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
        if wanted != self._wanted:
            ends = _ends(tensors, dtypes)
            self._reserve(ends[-1], pinned)
            self._wanted, self._places = (
                wanted,
                [
                    self._memory[begin : begin + tensor.numel() * dtype.itemsize].view(dtype).view(tensor.shape)
                    for tensor, dtype, begin in zip(tensors, dtypes, ends, strict=False)
                ],
            )
        return [*self._places]

    def _reserve(self, nbytes: int, pinned: bool) -> None:
        """Pinned only for copies from an accelerator: a run on the CPU would take a context there by it."""
        if len(self._memory) < nbytes:
            self._wanted, self._places = [], []
            self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")  # let go of the old one first
            self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned, device="cpu")


def _ends(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[int]:
    """Where each copy begins, and where the last ends: at a cache line, so that it is aligned for any dtype."""
    sizes = (-(-tensor.numel() * dtype.itemsize // 64) * 64 for tensor, dtype in zip(tensors, dtypes, strict=True))
    return [*itertools.accumulate(sizes, initial=0)]


@torch.no_grad()
def copy_into(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """Fill CPU tensors with tensors on any device, cast to their dtypes. No communication."""
    pairs = list(zip(tensors, copies, strict=True))
    if here := [pair for pair in pairs if pair[0].device.type == "cpu"]:
        torch._foreach_copy_([copy for _, copy in here], [tensor for tensor, _ in here])
    on_device = [pair for pair in pairs if pair[0].device.type != "cpu"]
    copy_to_host([tensor for tensor, _ in on_device], [copy for _, copy in on_device])
