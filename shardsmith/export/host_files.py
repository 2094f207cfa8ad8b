"""The files that a rank has open while slices are written to them, some of them lent by a rank of the same host."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from shardsmith.errors import WriteError
from shardsmith.export.syncs import cache_of, deal_addresses, lender_of
from shardsmith.formats.safetensors_files.plan import FilePlan
from shardsmith.formats.safetensors_files.writer import SafetensorsFileWriter
from shardsmith.ground.lent_files import Lender, borrow
from shardsmith.ground.ranks import Ranks

_MOST_OPEN = 256
"""Files at a time, of each directory; a rank opens more each time that it uses them."""

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
        self._open: dict[int, SafetensorsFileWriter] = {}
        self._changing = threading.Lock()  # of what is open; the lender has a thread of its own
        self._lender: Lender | None = None
        self._addresses: list[str] = []  # of the ranks of this host, as long as they lend something

    def create(self) -> list[int]:
        """Make all files, each at its full size; the numbers of those that stay open. The others are durable then.

        Raises:
            TargetExistsError, WriteError: a file cannot be made.
        """
        for number, file in enumerate(self._files):
            writer = SafetensorsFileWriter.create(self._directory, file)
            if not self._keep(number, writer):
                with writer:
                    writer.sync()
        return [*self._open]

    def share(self, ranks: Ranks) -> None:
        """Let one rank of each host open a file for all of them, if there are many to open. All ranks; communicates.

        Raises:
            RankFailedError, RankTimeoutError: on all ranks, if a rank has failed or died.
        """
        # The same on all ranks.
        if ranks.size * len(self._files) < _MANY_OPENS:
            return
        lender = self._lender = Lender(self._lend)
        self._addresses = ranks.deal(
            f"sharing the files of {self._directory.name}",
            lambda: (cache_of(self._directory, ranks.rank), lender.address),
            deal_addresses,
            large=True,
        )

    @contextlib.contextmanager
    def opened(self, number: int) -> Iterator[tuple[SafetensorsFileWriter, bool]]:
        """A file, and whether it stays open afterwards. Raises WriteError."""
        with self._changing:
            writer = self._open.get(number)
        # Not under the lock: while this rank asks another one, that one may ask this one.
        writer = writer or self._borrowed(number)
        with self._changing:
            writer = writer or self._open_here(number)
            is_kept = self._keep(number, writer)
        with contextlib.nullcontext() if is_kept else writer:
            yield writer, is_kept

    def sync(self, number: int) -> None:
        """Make a file durable that stayed open. Raises WriteError."""
        self._open[number].sync()

    def close(self) -> None:
        """Close all of them, and lend none any more."""
        if self._lender is not None:
            self._lender.close()
        while self._open:
            self._open.popitem()[1].close()

    def _open_here(self, number: int) -> SafetensorsFileWriter:
        # The lender's thread may have opened it by now.
        return self._open.get(number) or SafetensorsFileWriter.open_existing(self._directory, self._files[number])

    def _has_room(self, number: int) -> bool:
        # Else as many descriptors as files, which a large model in small shards has by the hundred.
        return number in self._open or len(self._open) < _MOST_OPEN

    def _keep(self, number: int, writer: SafetensorsFileWriter) -> bool:
        """Keep a file open, unless there are too many."""
        if self._has_room(number):
            self._open[number] = writer
            return True
        return False

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
