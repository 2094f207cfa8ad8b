"""The exports of one rank that are on their way: one being written in the background, one ready behind it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path

from shardsmith.sharding.live_boxes import StagingBuffer
from shardsmith.tensors.device_copy import release_pinned

from .background import Background

SLOTS = 2


@dataclass(frozen=True, slots=True)
class Running:
    """One export."""

    step: int
    future: Future[list[Path]]
    """The directories that it has made."""


class InFlight:
    """Runs exports one after the other in a thread, and keeps the staging buffers that they use in turn.

    Ranks stay in step by counting: what has ended on one may still be running on another, so rank 0 says how many
    have ended, and the others wait for as many. No communication.
    """

    def __init__(self, directories: int, most_bytes: int | None = None) -> None:
        """Begin with none.

        Args:
            directories: So many are made of each step; each is staged into a buffer of its own.
            most_bytes: The most that all buffers may take together; None: no bound.
        """
        self.started = 0
        self._ended_count = 0
        bound = None if most_bytes is None else most_bytes // (SLOTS * directories)
        self._free = [[StagingBuffer(bound) for _ in range(directories)] for _ in range(SLOTS)]
        self._lent: deque[list[StagingBuffer]] = deque()  # to exports that not all ranks know to have ended
        self._running: deque[Running] = deque()
        self._ended: list[Running] = []  # not yet taken
        self.background = Background("shardsmith-export")

    @property
    def next_buffers(self) -> list[StagingBuffer]:
        """What the next export is to be staged into. There must be room."""
        return self._free[-1]

    def start(self, step: int, export: Callable[[], list[Path]]) -> None:
        """Run an export, when those before it have ended."""
        self._running.append(Running(step, self.background.submit(export)))
        self._lent.append(self._free.pop())
        self.started += 1

    def ended(self) -> int:
        """How many exports have ended since the start."""
        return self._ended_count + sum(running.future.done() for running in self._running)

    def collect(self, count: int) -> None:
        """Wait until this many exports have ended since the start."""
        while self._ended_count < count:
            ended = self._running.popleft()
            # `wait` and not `result`: what failed is raised by whoever takes it.
            wait([ended.future])
            self._ended_count += 1
            self._ended.append(ended)

    def take_back(self, count: int) -> None:
        """As ``collect``, and take the buffers of so many exports back. The same number on all ranks.

        Else ranks would stage the next export into different buffers, and only some would ask for memory for theirs.
        """
        self.collect(count)
        while self.started - len(self._lent) < count:
            self._free.append(self._lent.popleft())

    def take_ended(self) -> list[Running]:
        """Return what was collected and not yet taken."""
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Wait for all, and free the buffers. Nothing can be exported afterwards."""
        self.background.close()
        # The memory of the old buffers is freed with them.
        self._free = [[StagingBuffer() for _ in buffers] for buffers in (*self._free, *self._lent)]
        self._lent.clear()
        release_pinned()
