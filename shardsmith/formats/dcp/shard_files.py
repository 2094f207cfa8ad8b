"""DCP files written straight from a source, front to back, as fast as its bytes can be digested.

torch's own writer needs the tensors in memory. Here each thread fills a file of its own: it reads a block from the
mapped source, cast where that is wanted, adds it to the digest of its tensor, to the checksum of its archive and to the
hash of its file, and writes it, all while it is in the processor's cache. Memory stays at a block a thread, whatever
the model's size. What is written goes to the disk meanwhile, so that little is left for the fsync in the end.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from shardsmith.formats.dcp.archive_file import ArchiveFile
from shardsmith.formats.describe import Measured
from shardsmith.formats.torch_files.archive_writer import archive_layout
from shardsmith.ground.commit import writing
from shardsmith.ground.maps import reads_by_maps
from shardsmith.ground.memory import map_pages, memory_of
from shardsmith.ground.threads import one_thread_per_operator, threads_per_process
from shardsmith.tensors.digest import Digest, digest_run
from shardsmith.tensors.narrowing import LostValues, is_narrower
from shardsmith.tensors.tensors import Chunk, TensorSource, TensorSpec, read_into, row_major_blocks

CHUNK_BYTES = 64 << 20
"""Of a tensor at most: whoever loads a part of one reads only the chunks that it meets."""
_MAPPED_BYTES = 16 << 20
"""Of a mapped source that is mapped in one go."""
_CAST_BYTES = 512 << 10
"""Small enough to stay in a core's own cache from the cast to the write."""
_LEAST_FILE_BYTES = 16 << 20
_MOST_THREADS = 8


@dataclass(frozen=True, slots=True)
class Stream:
    """A tensor on its way into a checkpoint."""

    spec: TensorSpec
    """Under its key, and in the dtype that it is to have."""
    source: TensorSource
    name: str
    """In the source."""


@dataclass(frozen=True, slots=True)
class PlannedChunk:
    """A part of a tensor, contiguous in row-major order, that becomes one archive."""

    key: str
    first: int
    """Flat index of its first element in the tensor."""
    box: Chunk
    nbytes: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a chunk was written."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Written:
    """What one rank wrote."""

    measured: Measured = field(default_factory=Measured)
    places: dict[int, Place] = field(default_factory=dict)
    """By number of the chunk in the plan."""


def plan_chunks(specs: Iterable[TensorSpec]) -> list[PlannedChunk]:
    """Return all chunks, in the order of the tensors; of a tensor without elements one, which is empty."""
    chunks = []
    for spec in specs:
        size = spec.dtype.itemsize
        # A tensor without elements has no block, but DCP wants an entry with a chunk for it.
        boxes = list(row_major_blocks(spec.shape, CHUNK_BYTES // size)) or [(0, Chunk.whole(spec.shape))]
        chunks += [PlannedChunk(spec.name, first, box, box.numel * size) for first, box in boxes]
    return chunks


def divide(chunks: Sequence[PlannedChunk], numbers: range, parts: int) -> list[range]:
    """Consecutive chunks for each part, with about the same number of bytes."""
    ends = list(itertools.accumulate(chunks[i].nbytes for i in numbers))
    total = ends[-1] if ends else 0
    cuts, start = [], numbers.start
    for part in range(parts):
        # The number of chunks that end within the first (part + 1) / parts of the bytes.
        stop = numbers.start + sum(end * parts <= total * (part + 1) for end in ends)
        # The last part takes what rounding has left over.
        stop = numbers.stop if part == parts - 1 else max(start, stop)
        cuts.append(range(start, stop))
        start = stop
    return cuts


def write_shard_files(
    streams: Mapping[str, Stream],
    chunks: Sequence[PlannedChunk],
    mine: range,
    directory: Path,
    rank: int,
    progress: Callable[[int], None] | None = None,
    first_file: int = 0,
) -> Written:
    """Write and fsync some of the chunks, as ``__<rank>_<i>.distcp``. No communication.

    Args:
        streams: By key, how to read the values.
        chunks: The planned chunks.
        mine: Numbers of the chunks that are this rank's.
        directory: Where to write them.
        rank: Number of this rank.
        progress: Called from the threads with the number of bytes just written.
        first_file: Number of the first file, where this rank has written some already.

    Raises:
        CheckpointError, WriteError: from reading or writing. No thread is left running.
        MismatchError: finite values are beyond the range of a planned dtype; all such tensors of these chunks by name.
    """
    nbytes = sum(chunks[i].nbytes for i in mine)
    most = threads_per_process() or os.cpu_count() or 1
    # Each thread writes a file of its own: a share of less than 16 MiB is not worth one.
    threads = max(1, min(_MOST_THREADS, most, nbytes // _LEAST_FILE_BYTES))
    shares = [part for part in divide(chunks, mine, threads) if part]
    with (
        # The threads are the parallelism: an operator of torch that starts its own threads in each would only
        # oversubscribe cores.
        one_thread_per_operator(),
        ThreadPoolExecutor(1, "shardsmith-sync") as syncing,
        ThreadPoolExecutor(threads, "shardsmith-shards") as pool,
    ):
        job = _Job(streams, chunks, directory, syncing, progress)
        try:
            futures = [
                pool.submit(job.write_file, f"__{rank}_{i}.distcp", part) for i, part in enumerate(shares, first_file)
            ]
            for future in futures:
                future.result()
        except BaseException:
            # The pool waits for its threads when it is left: they look at this after each block and stop soon.
            job.stopped = True
            raise
    if mine:
        job.lost.refuse(streams[chunks[mine.start].key].source.path, "Nothing was written.")
    return job.written


class _Job:
    """What the threads share."""

    def __init__(
        self,
        streams: Mapping[str, Stream],
        chunks: Sequence[PlannedChunk],
        directory: Path,
        syncing: ThreadPoolExecutor,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.written = Written()
        self.lost = LostValues()
        self.stopped = False
        self._streams = streams
        self._chunks = chunks
        self._directory = directory
        self._syncing = syncing
        self._progress = progress
        self._lock = threading.Lock()

    def write_file(self, name: str, numbers: range) -> None:
        """Write one file and fsync it. In a thread of its own."""
        path = self._directory / name
        try:
            with writing(path, "write"), ArchiveFile(path, self._syncing) as file:
                for i in numbers:
                    self._write_chunk(file, name, i)
                record = file.finish()
            with self._lock:
                self.written.measured.files[name] = record
        except BaseException:
            self.stopped = True
            raise

    def _write_chunk(self, file: ArchiveFile, name: str, number: int) -> None:
        chunk = self._chunks[number]
        stream = self._streams[chunk.key]
        archive = archive_layout(chunk.box.sizes, stream.spec.dtype)
        offset = file.begin(archive)
        digest = Digest()
        first = chunk.first
        held = stream.source.specs[stream.name].dtype
        for box, values in _runs(stream, chunk.box):
            if is_narrower(stream.spec.dtype, held):
                self.lost.add(stream.name, values, partial(_uncast, stream, box))
            digest += digest_run(values, first, partial(self._pass_on, file, memory_of(values)))
            first += values.numel()
            # Another thread has failed: the file is given up, so the archive need not be ended.
            if self.stopped:
                return
        file.end(archive)
        # Several threads may have chunks of the same tensor, whose digests add up.
        with self._lock:
            self.written.places[number] = Place(name, offset, archive.length)
            self.written.measured.add(chunk.key, digest)

    def _pass_on(self, file: ArchiveFile, memory: memoryview, begin: int, end: int) -> None:
        """Write a part of a run, while the digest has it in cache."""
        if self.stopped:
            return
        file.write_payload(memory[begin:end])
        if self._progress:
            self._progress(end - begin)


def _uncast(stream: Stream, box: Chunk) -> Tensor:
    dtype = stream.source.specs[stream.name].dtype
    return read_into(stream.source, stream.name, box, torch.empty(box.sizes, dtype=dtype, device="cpu"))


def _runs(stream: Stream, chunk: Chunk) -> Iterator[tuple[Chunk, Tensor]]:
    """The values of a chunk in the dtype that they are to have, run by run, in row-major order, with their box.

    Views on a mapped source that has them in one piece, with the box of the chunk; else each lies where the one before
    it lay.
    """
    dtype = stream.spec.dtype
    # Mapped and in the wanted dtype: views without a copy. Pages are mapped some MiB at a time, not one fault per page.
    if (values := _view(stream, chunk)) is not None:
        for part in values.split(_MAPPED_BYTES // dtype.itemsize):
            map_pages(part)
            yield chunk, part
        return
    count = _CAST_BYTES // dtype.itemsize
    # One buffer for all runs: a run must be written before the next one is asked for.
    scratch = torch.empty(min(count, chunk.numel), dtype=dtype, device="cpu")
    for _, box in row_major_blocks(chunk.sizes, count):
        out, there = scratch[: box.numel].view(box.sizes), box.moved(chunk.offsets)
        yield there, read_into(stream.source, stream.name, there, out)


def _view(stream: Stream, box: Chunk) -> Tensor | None:
    """The values as the source has them, flat, if it has them in that dtype and side by side."""
    if reads_by_maps() and box.numel and stream.source.specs[stream.name].dtype == stream.spec.dtype:
        pieces = list(stream.source.pieces(stream.name, box))
        if len(pieces) == 1 and pieces[0][0] == box and pieces[0][1].is_contiguous():
            return pieces[0][1].reshape(-1)
    return None
