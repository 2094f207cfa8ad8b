"""What saves of a step have copied, so that an export of the same step reads it instead of copying it once more.

A copy is found by the memory that it was made of: whatever an export calls a tensor, however it cuts it up, and
whichever object stands for it. Before the buffer of the save is used again, what is still to be read is copied out of
it: a save never waits for an export.
"""

from __future__ import annotations

import contextlib
import threading
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from operator import attrgetter

import torch
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
            buffer: Of the copies.
        """
        with contextlib.suppress(RuntimeError):  # tensors that were made in inference mode count no versions
            # A later copy into the same buffer replaces what was there.
            self._offers[buffer] = _Offer(tensors, copies)

    def clear(self) -> None:
        """Forget all copies. What was borrowed stays valid until it is given back."""
        self._offers.clear()

    def borrow(self, wanted: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> Borrowed:
        """Return the copies that there are of live tensors of this rank. To be given back, even if there are none.

        Args:
            wanted: The live tensors.
            dtypes: Into which their copies are to be cast.
        """
        borrowed = Borrowed(dtypes)
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
        copies: In the order in which they were asked for: in the shape of the live tensor, contiguous; None where
            there is none. To be read by ``read``: their memory may be used for something else at any time.
    """

    def __init__(self, dtypes: Sequence[torch.dtype]) -> None:
        self.copies: list[Tensor | None] = [None] * len(dtypes)
        self._dtypes = dtypes
        self._buffers: list[StagingBuffer] = []
        self._reading = threading.Lock()  # what is copied out of the buffers
        self._is_own = False

    def add(self, copies: Sequence[Tensor | None], buffer: StagingBuffer) -> None:
        """Borrow more from one buffer."""
        buffer.lend(self.move_out)
        self._buffers.append(buffer)
        self.copies = [old if new is None else new for old, new in zip(self.copies, copies, strict=True)]

    def read(self, number: int) -> Tensor:
        """Return the values of a copy, cast; nothing changes them while they are used. Any thread."""
        with self._reading:
            copy = self.copies[number]
            assert copy is not None, "there is none, or it was given back"
            return copy if self._is_own else copy.to(self._dtypes[number], copy=True)

    def move_out(self) -> None:
        """Copy what is still borrowed, cast, to memory of its own, and give it back. Any thread."""
        with self._reading:
            if not self._is_own:
                self.copies = [
                    copy if copy is None else copy.to(dtype, copy=True)
                    for copy, dtype in zip(self.copies, self._dtypes, strict=False)  # none are left if given back
                ]
                self._is_own = True
        self._return()

    def give_back(self) -> None:
        """Read them no more. Any thread; a second call does nothing."""
        with self._reading:
            self.copies = []
        self._return()

    def _return(self) -> None:
        with self._reading:
            buffers, self._buffers = self._buffers, []
        for buffer in buffers:
            buffer.give_back(self.move_out)


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
