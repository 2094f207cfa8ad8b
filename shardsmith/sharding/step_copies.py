"""What saves of a step have copied, so that an export of the same step reads it instead of copying it once more.

A copy is found by the memory that it was made of: whatever an export calls a tensor, however it cuts it up, and
whichever object stands for it. The buffer of the save is not used again before all exports have given back.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from operator import attrgetter

from torch import Tensor

from shardsmith.sharding.live_boxes import StagingBuffer

_VERSION = attrgetter("_version")


class StepCopies:
    """The copies of one step. On the thread that trains; to be cleared before anything that was copied may change."""

    def __init__(self) -> None:
        self._offers: dict[StagingBuffer, _Offer] = {}

    def offer(self, tensors: Sequence[Tensor], copies: Sequence[Tensor], buffer: StagingBuffer) -> None:
        """Let exports read copies, which are complete.

        Args:
            tensors: Live tensors of this rank. They are kept until ``clear``, so that no other ones get their memory.
            copies: Of them, in the same dtypes, contiguous, and in ``buffer``.
            buffer: Not used again while it is lent.
        """
        with contextlib.suppress(RuntimeError):  # tensors that were made in inference mode count no versions
            # A later copy into the same buffer replaces what was there.
            self._offers[buffer] = _Offer(tensors, copies)

    def clear(self) -> None:
        """Forget all copies. What was borrowed stays valid until it is given back."""
        self._offers.clear()

    def borrow(self, wanted: Sequence[Tensor]) -> Borrowed:
        """Return the copies that there are of live tensors of this rank. To be given back, even if there are none."""
        borrowed = Borrowed([None] * len(wanted))
        for buffer, offer in self._offers.items():
            found = [
                offer.find(tensor) if copy is None else None
                for tensor, copy in zip(wanted, borrowed.copies, strict=True)
            ]
            if any(copy is not None for copy in found):
                borrowed.add(found, buffer)
        return borrowed


class Borrowed:
    """Copies of somebody else, which can be read until they are given back.

    Attributes:
        copies: In the order in which they were asked for: in the shape and dtype of the live tensor, contiguous; None
            where there is none.
    """

    def __init__(self, copies: list[Tensor | None]) -> None:
        self.copies = copies
        self._buffers: list[StagingBuffer] = []

    def add(self, copies: Sequence[Tensor | None], buffer: StagingBuffer) -> None:
        """Borrow more from one buffer."""
        buffer.lend()
        self._buffers.append(buffer)
        self.copies = [old if new is None else new for old, new in zip(self.copies, copies, strict=True)]

    def give_back(self) -> None:
        """Read them no more. Any thread; a second call does nothing."""
        self.copies = []
        while self._buffers:
            self._buffers.pop().give_back()


class _Offer:
    """Tensors and their copies."""

    def __init__(self, tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
        self._tensors, self._copies = tensors, copies
        # A forward between save and export may write to buffers.
        self._versions = [*map(_VERSION, tensors)]

    @cached_property
    def _sorted(self) -> tuple[list[int], list[int]]:
        """Addresses of the tensors whose elements lie as in their copies, and positions. Only an export asks for it."""
        found = [(t.data_ptr(), i) for i, t in enumerate(self._tensors) if _is_plain(t)]
        found.sort()
        return [address for address, _ in found], [i for _, i in found]

    def find(self, wanted: Tensor) -> Tensor | None:
        """Return the copy of a tensor, or of a part of it; None if there is none."""
        addresses, positions = self._sorted
        place = bisect_right(addresses, wanted.data_ptr()) - 1
        if place < 0 or not _is_plain(wanted):
            return None
        i, offset = positions[place], wanted.data_ptr() - addresses[place]
        live, copy = self._tensors[i], self._copies[i]
        is_within = offset + wanted.nbytes <= live.nbytes and offset % live.element_size() == 0
        if (
            not is_within
            or live.dtype != wanted.dtype
            or live.device != wanted.device
            or self._versions[i] != live._version
        ):
            return None
        first = offset // live.element_size()
        return copy.view(-1)[first : first + wanted.numel()].view(wanted.shape)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.is_complex() and tensor.numel() > 0
