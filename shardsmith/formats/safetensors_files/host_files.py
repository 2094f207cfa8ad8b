"""The files that a rank has open while slices are written to them, some of them lent by a rank of the same host."""

from __future__ import annotations

import contextlib
import resource
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from shardsmith.errors import WriteError
from shardsmith.formats.safetensors_files.plan import FilePlan
from shardsmith.formats.safetensors_files.writer import SafetensorsFileWriter
from shardsmith.ground.lent_files import Lender, borrow
from shardsmith.ground.ranks import Ranks
from shardsmith.ground.syncs import cache_of, deal_addresses, lender_of

_MOST_PASSING = 8
"""Open of those that do not stay so: a tensor that is rounded goes to two files at a time."""

_MANY_OPENS = 10_000
"""By all ranks. Below, a file server is sooner done with them than the ranks of a host with asking each other."""


class HostFiles:
    """The files of one directory. They are called by their place in a list that all ranks have.

    Args:
        directory: Where they are.
        files: Their plans.
    """

    def __init__(self, directory: Path, files: Sequence[FilePlan]) -> None:
        self._directory = directory
        self._files = files
        self._most_open = _most_open()
        self._open: dict[int, SafetensorsFileWriter] = {}
        self._passing: dict[int, SafetensorsFileWriter] = {}  # those besides that were used last, in that order
        self._unsynced: set[int] = set()
        self._changing = threading.Lock()  # of what is open; the lender has a thread of its own
        self._lender: Lender | None = None
        self._addresses: Sequence[str] = ()  # of the ranks of this host, as long as they lend something

    def create(self) -> None:
        """Make all files, each at its full size. They are durable when what is ``unsynced`` is.

        Raises:
            TargetExistsError, WriteError: a file cannot be made.
        """
        for number, file in enumerate(self._files):
            writer = SafetensorsFileWriter.create(self._directory, file)
            self._unsynced.add(number)
            if not self._keep(number, writer):
                with writer:
                    writer.sync()
                self._unsynced.remove(number)

    def are_many(self, ranks: int) -> bool:
        """Whether one rank of each host had better open a file for all of them. The same on all ranks."""
        return ranks * len(self._files) >= _MANY_OPENS

    def lend(self) -> str:
        """Open files for other ranks of this host from now on; where they ask for them. No communication."""
        self._lender = Lender(self._lend)
        return self._lender.address

    def borrow_from(self, addresses: Sequence[str]) -> None:
        """Ask there for files from now on. ``addresses``: those of all ranks of this host, in their order."""
        self._addresses = addresses

    def share(self, ranks: Ranks) -> None:
        """Let one rank of each host open a file for all of them, if there are many to open. All ranks; communicates.

        Raises:
            RankFailedError, RankTimeoutError: on all ranks, if a rank has failed or died.
        """
        if self.are_many(ranks.size):
            addresses = ranks.deal(
                f"sharing the files of {self._directory.name}",
                lambda: (cache_of(self._directory, ranks.rank), self.lend()),
                deal_addresses,
                large=True,
            )
            self.borrow_from(addresses)

    def to_write(self, number: int) -> SafetensorsFileWriter:
        """Return a file to be changed. It is open until others are asked for, at least. Raises WriteError."""
        self._unsynced.add(number)
        return self.to_read(number)

    def to_read(self, number: int) -> SafetensorsFileWriter:
        """Return a file that this rank does not change. As ``to_write``."""
        with self._changing:
            found = self._open.get(number)
        if found is None and (found := self._passing.pop(number, None)) is not None:
            self._passing[number] = found  # it was used last now
        if found is None:
            # Not under the lock: while this rank asks another one, that one may ask this one.
            found = self._borrowed(number)
            with self._changing:
                found = found or self._open_here(number)
                is_kept = self._keep(number, found)
            if not is_kept:
                self._let_pass(_MOST_PASSING - 1)
                self._passing[number] = found
        return found

    def unsynced(self) -> list[int]:
        """Return the numbers of the files that this rank has changed, and that are not known to be durable.

        Those that do not stay open are made durable before. Raises WriteError.
        """
        self._let_pass(0)
        return sorted(self._unsynced)

    def sync(self, numbers: Sequence[int]) -> None:
        """Make what all ranks of this host have written to these files durable; the others are for other ranks.

        Raises WriteError.
        """
        for number in numbers:
            self.to_read(number).sync()
            self._unsynced.discard(number)
        self._unsynced.clear()

    def close(self) -> None:
        """Close all of them, and lend none any more."""
        if self._lender is not None:
            self._lender.close()
        for files in (self._passing, self._open):
            while files:
                files.popitem()[1].close()

    def _open_here(self, number: int) -> SafetensorsFileWriter:
        # The lender's thread may have opened it by now.
        return self._open.get(number) or SafetensorsFileWriter.open_existing(self._directory, self._files[number])

    def _has_room(self, number: int) -> bool:
        # Else as many descriptors as files, which a large model in small shards has by the hundred.
        return number in self._open or len(self._open) < self._most_open

    def _keep(self, number: int, writer: SafetensorsFileWriter) -> bool:
        """Keep a file open, unless there are too many."""
        if self._has_room(number):
            self._open[number] = writer
            return True
        return False

    def _let_pass(self, most: int) -> None:
        """Leave as many open of those that do not stay so. What this rank has changed in the others is made durable."""
        while len(self._passing) > most:
            number = next(iter(self._passing))
            with self._passing.pop(number) as writer:
                if number in self._unsynced:
                    writer.sync()
                    self._unsynced.remove(number)

    def _borrowed(self, number: int) -> SafetensorsFileWriter | None:
        address = lender_of(number, self._addresses) if self._addresses else ""
        # Empty: that rank does not lend. It may be this one.
        if not address or self._lender is None or address == self._lender.address:
            return None
        descriptor = borrow(address, number)
        if descriptor is None:
            # It has failed, died, or as many open as it may have: the next question would take as long.
            self._addresses = ["" if one == address else one for one in self._addresses]
            return None
        file = self._files[number]
        return SafetensorsFileWriter(self._directory / file.name, file, descriptor)

    def _lend(self, number: int) -> int | None:
        """Return a new descriptor of a file, opened for whoever asks if need be; None if too many are open."""
        # On a failure: whoever asks opens the file by itself, and has the same error to raise.
        with contextlib.suppress(WriteError), self._changing:
            if self._has_room(number):
                writer = self._open[number] = self._open_here(number)
                return writer.duplicate()
        return None


def _most_open() -> int:
    """How many files stay open: half of what the process may have. A rank opens more each time that it uses them."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit // 2
