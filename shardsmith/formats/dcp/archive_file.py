"""A file of ``torch.save`` archives, written front to back: hashed, and on its way to the disk, while it grows."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Self

import xxhash

from shardsmith.formats.torch_files.archive_writer import ALIGNMENT, ArchiveLayout
from shardsmith.ground.new_file import new_file
from shardsmith.manifest.metadata import FileRecord
from shardsmith.tensors.checksums import crc32

_SMALL_BYTES = 64 << 10
"""What is shorter is gathered first, so that a small tensor costs neither a call of the system nor one of the hash."""
_GATHERED_BYTES = 512 << 10
_SYNCED_BYTES = 32 << 20
"""After so many bytes they begin to go to the disk, so that little is left for the fsync in the end."""


class ArchiveFile:
    """A new file; an archive in it is one tensor, or any value that torch has saved."""

    def __init__(self, path: Path, syncing: ThreadPoolExecutor, expected_bytes: int = 0) -> None:
        """Make the file. ``syncing`` runs fsyncs meanwhile; ``expected_bytes`` is about how long it will be."""
        self._file = new_file(path, expected_bytes)
        self._hash = xxhash.xxh3_128()
        self._size = 0
        self._crc = 0
        self._gathered = bytearray()
        self._syncing = syncing
        self._synced: Future[None] | None = None
        self._synced_size = 0

    def begin(self, archive: ArchiveLayout) -> int:
        """Begin the archive of a tensor, aligned; where."""
        self._write(memoryview(bytes(-self._size % ALIGNMENT)))
        offset = self._size
        self._write(memoryview(archive.head))
        self._crc = 0
        return offset

    def write_payload(self, memory: memoryview) -> None:
        """Go on with the bytes of the archive's tensor."""
        self._crc = crc32(memory, self._crc)
        self._write(memory)

    def end(self, archive: ArchiveLayout) -> None:
        """End the archive."""
        self._write(memoryview(archive.tail(self._crc)))
        self._start_sync()

    def write_archive(self, data: bytes) -> int:
        """Write a whole archive, aligned; where."""
        self._write(memoryview(bytes(-self._size % ALIGNMENT)))
        offset = self._size
        self._write(memoryview(data))
        return offset

    def finish(self) -> FileRecord:
        """Make the file durable; what it is."""
        self._flush()
        self._wait()  # an error of the disk is told once only
        # This fsync is the one that counts: the earlier ones only leave less for it to do.
        self._file.finish()
        return FileRecord(size=self._size, xxh3_128=self._hash.hexdigest())

    def _start_sync(self) -> None:
        is_due = self._size - self._synced_size >= _SYNCED_BYTES
        # At most one fsync of a file runs at a time: while the disk is slow, the writer goes on without more of them.
        if is_due and (self._synced is None or self._synced.done()):
            self._wait()
            self._synced = self._syncing.submit(self._file.sync)
            self._synced_size = self._size

    def _wait(self) -> None:
        if self._synced is not None:
            self._synced.result()

    def _write(self, memory: memoryview) -> None:
        self._size += len(memory)
        # What was gathered goes first: the hash needs the bytes in the order of the file.
        if len(memory) >= _SMALL_BYTES:
            self._flush()
            self._write_out(memory)
            return
        self._gathered += memory
        if len(self._gathered) >= _GATHERED_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._gathered:
            gathered, self._gathered = self._gathered, bytearray()
            self._write_out(memoryview(gathered))

    def _write_out(self, memory: memoryview) -> None:
        self._hash.update(memory)
        self._file.write(memory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        # After an error, too: a thread in fsync must not find its descriptor closed, or taken by another file.
        if self._synced is not None:
            wait([self._synced])
        self._file.close()
