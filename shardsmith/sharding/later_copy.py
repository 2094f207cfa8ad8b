"""A copy of tensors that is made while the training goes on, up to the moment at which they change.

Parameters, moments and averages change in ``optimizer.step()`` and in what follows it. Until the next one they can be
copied during the forward and the backward. Whether anything has changed them all the same is looked at on the thread
that trains, when all is copied: an operator counts the version of a tensor up after it has written, so that another
thread might look too early.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from shardsmith.errors import UsageError
from shardsmith.ground.memory import sample_of
from shardsmith.sharding.live_boxes import copy_into

_BATCH_BYTES = 16 << 20
"""Of tensors that a thread copies at once, so that two threads can share the work."""

_open: weakref.WeakSet[LaterCopy] = weakref.WeakSet()


class LaterCopy:
    """Tensors and where their copies go. Made on the thread that trains, which also settles it."""

    def __init__(
        self, names: Sequence[str], owners: Sequence[Tensor], tensors: Sequence[Tensor], copies: Sequence[Tensor]
    ) -> None:
        """Nothing is copied yet.

        Args:
            names: For the error that says which have changed.
            owners: What each is a local part of; an operator on a DTensor counts no version of the part.
            tensors: What is copied, of this rank and on any device.
            copies: CPU tensors of the same shapes; where the dtype is another one, the values are cast.
        """
        self._names = names
        self._owners = owners
        self._tensors = tensors
        self._before = [*map(_look, owners, tensors)]
        self._samples = [*map(_sample, tensors)]
        self._copies = copies
        self._batches = [*_batches(tensors)]
        self._next = itertools.count()  # one thread takes a batch: of CPython's counters each number is given once
        self._left = len(self._batches)
        self._lock, self._copied = threading.Lock(), threading.Event()
        if not self._batches:
            self._copied.set()
        self._stream = _ordered_stream(tensors)
        self._result: Future[None] = Future()
        self._failed: Exception | None = None
        _open.add(self)
        _settle_at_exit()

    def copy(self) -> None:
        """Copy what no other thread has begun to copy; returns when all is copied. Any thread."""
        # The writing thread and, when it settles, the training thread take batches from one counter: so the training
        # helps with what is left instead of waiting for it.
        with self._stream or contextlib.nullcontext():
            while (number := next(self._next)) < len(self._batches):
                batch = self._batches[number]
                try:
                    copy_into(self._tensors[batch], self._copies[batch])
                except Exception as error:  # raised by ``result``
                    self._failed = error
                self._count_down()
        self._copied.wait()

    def settle(self) -> None:
        """Return when all is copied; from then on the tensors may change. On the thread that trains; never raises.

        A second call does nothing.
        """
        if self._result.done():
            return
        self.copy()
        error = self._failed or self._change()
        # The live tensors are let go: a model that is deleted later must not stay in memory for a finished save.
        self._owners, self._tensors, self._copies = [], [], []
        _open.discard(self)
        if error is None:
            self._result.set_result(None)
        else:
            self._result.set_exception(error)

    def result(self) -> None:
        """Wait until it is settled. Any other thread.

        Raises:
            UsageError: naming all tensors that have changed before.
        """
        self._result.result()

    def _count_down(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._copied.set()

    def _change(self) -> UsageError | None:
        now = [*map(_look, self._owners, self._tensors)]
        # a copy that is cast has other bytes
        bytes_now = [c if c.dtype == t.dtype else t for c, t in zip(self._copies, self._tensors, strict=True)]
        found = zip(self._names, self._before, now, self._samples, bytes_now, strict=True)
        changed = [
            name
            for name, before, after, sample, held in found
            if before != after or (sample is not None and sample != _sample(held))
        ]
        if not changed:
            return None
        lines = "\n  ".join(changed)
        return UsageError(
            f"{len(changed)} tensors were changed before the next optimizer.step(), while they were copied:"
            f'\n  {lines}\nWith staging="overlap" only optimizers and the average may change them. Change them right '
            'after optimizer.step(), before the hooks take the step; or use staging="copy".'
        )


def _batches(tensors: Sequence[Tensor]) -> Iterator[slice]:
    begin = nbytes = 0
    for end, tensor in enumerate(tensors, 1):
        nbytes += tensor.nbytes
        if nbytes >= _BATCH_BYTES or end == len(tensors):
            yield slice(begin, end)
            begin, nbytes = end, 0


def _ordered_stream(tensors: Sequence[Tensor]) -> torch.Stream | None:
    """A stream behind all work on the device up to now, so that the copies do not wait for what comes later."""
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)
    if device is None:
        return None
    stream = torch.Stream(device=device)
    stream.wait_stream(torch.accelerator.current_stream(device))
    return stream


def _look(owner: Tensor, tensor: Tensor) -> tuple[int, int]:
    """How often each was written to. A ShardedTensor counts nothing; it is a copy that FSDP1 made."""
    return 0 if isinstance(owner, ShardedTensor) else owner._version, tensor._version


def _sample(tensor: Tensor) -> bytes | None:
    """Some of its bytes, since a change through ``tensor.data`` counts no version. None of one on a device."""
    return sample_of(tensor) if tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj() else None


_exit_lock = threading.Lock()
_is_registered = False


def _settle_at_exit() -> None:
    """See to it that a process that ends without ``close`` commits its last save, and does not wait for ever."""
    global _is_registered
    with _exit_lock:
        if not _is_registered:  # not ``atexit``: executors wait for their threads before that
            threading._register_atexit(_settle_all)  # type: ignore[attr-defined]
            _is_registered = True


def _settle_all() -> None:
    for one in [*_open]:
        one.settle()
