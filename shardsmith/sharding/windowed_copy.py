"""A copy of tensors in bounded memory: a window of them is written while the next is copied.

There are two windows. So the thread that copies, which is the one that trains, waits for the disk.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from shardsmith.sharding.live_boxes import StagingBuffer


class WindowedCopy:
    """Tensors that one thread copies and another one takes, in order.

    Each copy is valid until the one after the next window is asked for.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        dtypes: Sequence[torch.dtype],
        buffers: tuple[StagingBuffer, StagingBuffer],
        most_bytes: int,
    ) -> None:
        """Nothing is copied yet.

        Args:
            tensors: What is copied, on any device.
            dtypes: Those of the copies.
            buffers: Memory of the windows.
            most_bytes: Of both windows. One tensor alone may take more.
        """
        self._windows = [*_windows(tensors, dtypes, most_bytes // 2)]
        self._tensors, self._dtypes = tensors, dtypes
        self._buffers = buffers
        self._copies: list[list[Tensor]] = []
        self._changed = threading.Condition()
        self._taken = 0
        self._error: Exception | None = None
        self._is_stopped = False

    def fill(self) -> None:
        """Copy all, as there is room. On the thread that trains; returns when all is copied, or nobody takes it."""
        for number, window in enumerate(self._windows):
            with self._changed:
                self._changed.wait_for(partial(self._has_room, number))
            if self._is_stopped or self._error is not None:
                return
            self._copy(number, window)

    def warm(self) -> None:
        """Make the memory of the windows, and copy nothing."""
        for number, window in enumerate(self._windows):
            self._buffers[number % 2].warm(self._tensors[window], self._dtypes[window])

    def take_windows(self) -> Iterator[list[Tensor]]:
        """Yield the copies of each window when they are there. On the other thread. Raises what copying raised."""
        for number in range(len(self._windows)):
            with self._changed:
                self._changed.wait_for(partial(self._is_filled, number))
            if self._error is not None:
                raise self._error
            yield self._copies[number]
            with self._changed:
                self._copies[number] = []
                self._taken = number + 1
                self._changed.notify_all()

    def _has_room(self, number: int) -> bool:
        return self._taken >= number - 1 or self._is_stopped or self._error is not None

    def _is_filled(self, number: int) -> bool:
        return len(self._copies) > number or self._error is not None

    def stop(self) -> None:
        """Take nothing any more: let the other thread go. Any thread; a second call does nothing."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def _copy(self, number: int, window: slice) -> None:
        copies, error = [], None
        try:
            copies = self._buffers[number % 2].copy(self._tensors[window], self._dtypes[window])
        except Exception as failed:  # raised by ``take_windows``
            error = failed
        with self._changed:
            self._copies.append(copies)
            self._error = error
            self._changed.notify_all()


def _windows(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype], most_bytes: int) -> Iterator[slice]:
    begin = nbytes = 0
    for end, (tensor, dtype) in enumerate(zip(tensors, dtypes, strict=True)):
        size = tensor.numel() * dtype.itemsize
        if end > begin and nbytes + size > most_bytes:
            yield slice(begin, end)
            begin, nbytes = end, 0
        nbytes += size
    if begin < len(tensors):
        yield slice(begin, len(tensors))
