"""The share of one rank in an export of live weights: what it holds, what it is to write, and a staged copy of that."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import attrgetter

import torch
from torch import Tensor

from shardsmith.ground.host_memory import require_memory
from shardsmith.ground.ranks import Ranks
from shardsmith.sharding.local_boxes import local_boxes
from shardsmith.tensors.device_copy import copy_to_host
from shardsmith.tensors.tensors import Chunk, Shape

_SHAPE, _IS_CPU = attrgetter("shape"), attrgetter("is_cpu")


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
    read: Callable[[], Tensor] | None = None
    """Returns the values as they are to be written, where ``values`` are somebody else's, who may need their memory."""

    def written(self) -> Tensor:
        """Return the values as they are to be written: themselves, or a copy for this call."""
        return self.values if self.read is None else self.read()


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
        most_bytes: If a copy took more memory, it is made in windows that take this much together. None: no bound.
        has_room: Whether the hosts were found to have memory for it, by all ranks together.
    """

    def __init__(self, most_bytes: int | None = None) -> None:
        """It takes no memory yet."""
        self.most_bytes = most_bytes
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.has_room = False
        self._wanted: tuple[bool, list[torch.Size], list[torch.dtype]] | None = None  # of the last call, as the places
        self._places: list[Tensor] = []
        self._readers: list[Callable[[], None]] = []
        self._changing = threading.Lock()  # of the readers

    def lend(self, move_out: Callable[[], None]) -> None:
        """Let somebody else read the copies until ``give_back``.

        Args:
            move_out: Called before the buffer is used again, on that thread: copies what is still to be read, and
                gives back.
        """
        with self._changing:
            self._readers.append(move_out)

    def give_back(self, move_out: Callable[[], None]) -> None:
        """End what ``lend`` has begun. Any thread."""
        with self._changing:
            self._readers.remove(move_out)

    def require_room(
        self, ranks: Ranks, phase: str, wanted: Callable[[], tuple[Sequence[Tensor], Sequence[torch.dtype]]]
    ) -> None:
        """Return when every host has room for the copies of its ranks. All ranks; communicates.

        Args:
            ranks: Of the calling thread.
            phase: The moment, for the error.
            wanted: Returns what this rank is to copy, and the dtypes of the copies.

        Raises:
            RankFailedError: on all ranks, if a host has too little, or ``wanted`` raised on any.
        """

        def need() -> int:
            growth = self.growth(*wanted())
            return growth if self.most_bytes is None else min(growth, self.most_bytes)

        require_memory(ranks, phase, need)
        self.has_room = True

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
        """Return where the copies are to go, valid as those of ``copy``. Nothing is copied.

        Whoever reads the last copies has them moved out first.
        """
        with self._changing:
            readers = [*self._readers]
        for move_out in readers:
            move_out()
        pinned = not all(map(_IS_CPU, tensors))
        wanted = pinned, [*map(_SHAPE, tensors)], [*dtypes]
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
            self._wanted, self._places = None, []
            self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")  # let go of the old one first
            self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned, device="cpu")


def _ends(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[int]:
    """Where each copy begins, and where the last ends: at a cache line, so that it is aligned for any dtype."""
    sizes = (-(-tensor.numel() * dtype.itemsize // 64) * 64 for tensor, dtype in zip(tensors, dtypes, strict=True))
    return [*itertools.accumulate(sizes, initial=0)]


@torch.no_grad()
def copy_into(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """Fill CPU tensors with tensors on any device, cast to their dtypes. No communication."""
    on_host = [*map(_IS_CPU, tensors)]
    if any(on_host):
        torch._foreach_copy_([*compress(copies, on_host)], [*compress(tensors, on_host)])
    if not all(on_host):
        on_device = [not here for here in on_host]
        copy_to_host([*compress(tensors, on_device)], [*compress(copies, on_device)])
