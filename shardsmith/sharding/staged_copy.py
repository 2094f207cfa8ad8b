"""The copy of what a rank writes, so that the live tensors may change meanwhile: at once, later, or window by window.

Saves and exports have the same three ways. All at once is the usual one. What does not change before a known moment may
be copied until then (``LaterCopy``). What does not fit is copied in windows, while it is written (``WindowedCopy``).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from shardsmith.sharding.later_copy import LaterCopy
from shardsmith.sharding.live_boxes import StagingBuffer, copy_into
from shardsmith.sharding.step_copies import StepCopies
from shardsmith.sharding.windowed_copy import WindowedCopy

SMALL_BYTES = 32 << 10
"""A tensor below this is copied faster than it can be watched for changes."""

_GIVE_WAY_SECS = 0.01
"""The training threads of a host learn one after the other that all have copied. Were one rank to write at once, it
would take the cores from those that have yet to go on."""

FindOwner = Callable[[int], tuple[str, Tensor] | None]
"""Takes the position of a tensor that does not change before ``settle``; returns its name, and the live tensor that it
is a part of. None for one that may change."""


class StagedCopy:
    """One copy. The thread that trains makes it, feeds and settles it; the one that writes takes it."""

    def __init__(self, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype], buffer: StagingBuffer) -> None:
        """Nothing is copied yet.

        Args:
            tensors: What is copied, on any device.
            dtypes: Those of the copies.
            buffer: Where they go.
        """
        self._tensors, self._dtypes, self._buffer = tensors, dtypes, buffer
        self._copies: list[Tensor] = []
        self._later: LaterCopy | None = None
        self._windows: WindowedCopy | None = None
        sizes = (tensor.numel() * dtype.itemsize for tensor, dtype in zip(tensors, dtypes, strict=True))
        if buffer.most_bytes is not None and sum(sizes) > buffer.most_bytes:
            self._windows = WindowedCopy(tensors, dtypes, (buffer, buffer.beside), buffer.most_bytes)

    @property
    def is_whole(self) -> bool:
        """Whether all is copied at once, so that every copy is valid until the buffer is used again."""
        return self._windows is None

    def warm(self) -> None:
        """Make the memory, and copy nothing. Any thread; no communication."""
        if self._windows is not None:
            self._windows.warm()
        else:
            self._buffer.warm(self._tensors, self._dtypes)

    def begin(self, find_owner: FindOwner | None = None, step_copies: StepCopies | None = None) -> None:
        """Copy all but what is left to the thread that writes. Main thread; no communication.

        Args:
            find_owner: Tells what may be left. None leaves nothing.
            step_copies: Where to offer the copies to others, if all of them are made now.
        """
        if self._windows is not None:
            return
        tensors, self._tensors = self._tensors, []  # afterwards the live ones are needed no more
        self._copies = copies = self._buffer.places(tensors, self._dtypes)
        large = [] if find_owner is None else [i for i, copy in enumerate(copies) if copy.nbytes >= SMALL_BYTES]
        later = {i: owner for i in large if find_owner is not None and (owner := find_owner(i)) is not None}
        if not later:
            copy_into(tensors, copies)
            if step_copies is not None:
                step_copies.offer(tensors, copies, self._buffer)
        else:
            now = [i for i in range(len(tensors)) if i not in later]
            copy_into([tensors[i] for i in now], [copies[i] for i in now])
            names, owners = zip(*later.values(), strict=True)
            self._later = LaterCopy(names, owners, [tensors[i] for i in later], [copies[i] for i in later])

    def feed(self) -> None:
        """Copy what is being taken, as there is room. Main thread; returns when all is copied, or nobody takes it."""
        if self._windows is not None:
            self._windows.fill()

    def settle(self) -> None:
        """Return when what was left for later is copied: from then on it may change. Main thread; never raises."""
        if self._later is not None:
            self._later.settle()

    def stop(self) -> None:
        """Let ``feed`` return, since nothing is taken any more. Any thread; a second call does nothing."""
        if self._windows is not None:
            self._windows.stop()

    @contextlib.contextmanager
    def taken(self) -> Iterator[Iterator[list[Tensor]]]:
        """Within it all copies can be had, in lists; each list is valid until the next one. On the thread that writes.

        Raises:
            UsageError: at the end, if tensors that were copied later have changed before, naming all of them.
        """
        try:
            yield self._lists()
        finally:
            # Also after an error: the main thread may be waiting in ``feed`` for a window that nobody takes any more.
            self.stop()
        # Only now: whether tensors changed during the copy is known once the training thread has settled it.
        if self._later is not None:
            self._later.result()

    def _lists(self) -> Iterator[list[Tensor]]:
        if self._windows is not None:
            yield from self._windows.take_windows()
            return
        time.sleep(_GIVE_WAY_SECS)
        if self._later is not None:
            self._later.copy()
        yield self._copies
