"""Copies of tensors on an accelerator in CPU memory, cast on the way, with a bound on what the casts take there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shardsmith.tensors.tensors import Chunk, row_major_blocks

WINDOW_BYTES = 128 << 20
"""What the casts take on a device at any time, whatever the size of the tensors."""
_LINE = 64


@torch.no_grad()
def copy_to_host(tensors: Sequence[Tensor], copies: Sequence[Tensor], window_bytes: int = WINDOW_BYTES) -> None:
    """Fill CPU tensors with tensors on accelerators, cast to their dtypes; returns when they are there.

    Ordered after all work on the current streams of the tensors' devices. A window of tensors is cast on the device,
    and one copy brings it over, while the next is cast. No communication.

    Args:
        tensors: On accelerators; not changed.
        copies: Contiguous, in pinned memory if they are not to take twice as long. Where two lie less than 64 bytes
            apart in one memory, the bytes between them may be overwritten.
        window_bytes: How much to copy at a time, in bytes.
    """
    by_memory: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for tensor, copy in zip(tensors, copies, strict=True):
        if copy.numel():
            # One copy per window needs a window that is consecutive in one memory of the host.
            by_memory.setdefault((tensor.device, copy.untyped_storage().data_ptr()), []).append((tensor, copy))
    running: list[_Copy] = []
    try:
        for (device, _), pairs in by_memory.items():
            running.append(_Copy(device, [*windows(pairs, window_bytes // 2)]))
            running[-1].launch()
    finally:  # after an error, too: the memory of the casts must outlive what was launched
        for one in running:
            one.wait()


def release_pinned() -> None:
    """Give pinned memory that nothing uses any more back to the system: torch would keep it for the next copies."""
    # torch 2.11 has no public name for it
    release = getattr(torch.accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
    if release is not None and torch.accelerator.is_available():
        release()


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor, and the bytes of the memory that it goes to."""

    source: Tensor
    dtype: torch.dtype
    begin: int
    end: int


@dataclass(slots=True)
class Window:
    """Pieces that go to consecutive bytes of one memory."""

    memory: Tensor
    """uint8; all of it."""
    pieces: list[Piece] = field(default_factory=list)

    @property
    def begin(self) -> int:
        """The first byte in the memory."""
        return self.pieces[0].begin

    @property
    def end(self) -> int:
        """The byte after the last one."""
        return self.pieces[-1].end

    @property
    def base(self) -> int:
        """Where it would begin at a multiple of 64 bytes: what is aligned in the memory is aligned from here."""
        return self.begin // _LINE * _LINE

    def takes(self, piece: Piece, most_bytes: int) -> bool:
        """Return whether a piece may follow: it comes next in the memory, and there is room."""
        is_next = not self.pieces or self.end <= piece.begin < self.end + _LINE
        return is_next and (not self.pieces or piece.end - self.base <= most_bytes)


def windows(pairs: Sequence[tuple[Tensor, Tensor]], most_bytes: int) -> Iterator[Window]:
    """Cut tensors, whose copies all lie in one memory, into windows of at most this size."""
    # All of the storage as bytes: copies of several dtypes lie in it side by side.
    memory = torch.empty(0, dtype=torch.uint8, device="cpu").set_(pairs[0][1].untyped_storage())
    window = Window(memory)
    # Less one line, since a window may begin up to 63 bytes before its first piece.
    for piece in _pieces(pairs, most_bytes - _LINE):
        if not window.takes(piece, most_bytes):
            yield window
            window = Window(memory)
        window.pieces.append(piece)
    yield window


def _pieces(pairs: Sequence[tuple[Tensor, Tensor]], most_bytes: int) -> Iterator[Piece]:
    for tensor, copy in pairs:
        shape, size = tuple(tensor.shape), copy.element_size()
        for first, box in row_major_blocks(shape, most_bytes // size):
            # In bytes: storage offset and flat index both count elements of the copy.
            begin = (int(copy.storage_offset()) + first) * size
            yield Piece(tensor[box.within(Chunk.whole(shape))], copy.dtype, begin, begin + box.numel * size)


class _Copy:
    """What goes from one device to one memory."""

    def __init__(self, device: torch.device, windows: list[Window]) -> None:
        self._device = device
        self._windows = windows
        largest = max(window.end - window.base for window in windows)
        # Two buffers in turn: one is copied to the host while the other is filled.
        self._casts = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in windows[:2]]
        self._casting, self._copying = torch.Stream(device=device), torch.Stream(device=device)

    def launch(self) -> None:
        """Begin, behind everything that the current stream of the device has to do."""
        # Behind the kernels that still write the tensors, on the stream of the caller.
        self._casting.wait_stream(torch.accelerator.current_stream(self._device))
        copied: list[Any] = [None, None]
        for i, window in enumerate(self._windows):
            casts = self._casts[i % 2]
            # The buffer may be filled again only when the copy out of it has ended.
            if copied[i % 2] is not None:
                self._casting.wait_event(copied[i % 2])
            with self._casting:
                _cast(window, casts)
            self._copying.wait_stream(self._casting)
            with self._copying:
                target = window.memory[window.begin : window.end]
                # Asynchronous only into pinned memory.
                target.copy_(casts[window.begin - window.base : window.end - window.base], non_blocking=True)
            copied[i % 2] = self._copying.record_event()

    def wait(self) -> None:
        """Return when all that was begun has ended."""
        self._casting.synchronize()
        self._copying.synchronize()


def _cast(window: Window, casts: Tensor) -> None:
    for piece in window.pieces:
        place = casts[piece.begin - window.base : piece.end - window.base]
        place.view(piece.dtype).view(piece.source.shape).copy_(piece.source)
