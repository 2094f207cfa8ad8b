"""Copy a source's tensors into planned safetensors files, block by block, with several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from shardsmith.formats.safetensors_files.upload import SafetensorsUpload
from shardsmith.formats.safetensors_files.writer import SafetensorsFileWriter
from shardsmith.ground.threads import one_thread_per_operator, useful_threads
from shardsmith.tensors.digest import Digest, digest_run
from shardsmith.tensors.narrowing import LostValues, is_narrower
from shardsmith.tensors.tensors import Chunk, TensorSource, TensorSpec, read_into, row_major_blocks

_BLOCK_BYTES = 2 << 20
"""Of output: large enough that Python costs little, small enough to stay in cache from the cast to the write."""

BlockWriter = SafetensorsFileWriter | SafetensorsUpload
"""The latter takes blocks of one thread only."""
Block = tuple[BlockWriter, TensorSpec, int, Chunk]


def copy_blocks(
    source: TensorSource,
    writers: Sequence[BlockWriter],
    progress: Callable[[int], None] | None = None,
    *,
    part: int = 0,
    parts: int = 1,
    threads: int | None = None,
) -> dict[str, Digest]:
    """Fill files with the tensors that they are planned for, cast to the planned dtypes; the digest of each tensor.

    No communication. Memory: one block a thread.

    Args:
        source: Holds every planned tensor, in the planned shape.
        writers: The planned files, open for writing.
        progress: Called from the threads with the number of bytes just written.
        part: Which share of the blocks to copy, so that ranks can divide them; the digests are shares, then, too.
        parts: Into how many shares.
        threads: 1 stays in this thread and leaves torch's threads alone, as in a process that trains. None: as many as
            are of use.

    Raises:
        CheckpointError, WriteError: from reading or writing. The other threads stop at their next block; none is left
            running, also after a KeyboardInterrupt.
        MismatchError: finite values are beyond the range of a planned dtype; all such tensors of this share by name.
    """
    copier = _Copier(source, writers, progress, part, parts)
    if threads == 1:
        # In the caller's thread: a pool would need torch's setting of threads, which is one of the whole process.
        copier.work()
        return copier.result()
    threads = threads or useful_threads(copier.nbytes, copier.count)
    with one_thread_per_operator(), ThreadPoolExecutor(threads, "shardsmith-copy") as pool:
        try:
            futures = [pool.submit(copier.work) for _ in range(threads)]
            for future in futures:
                future.result()
        except BaseException:
            # The block's end waits for the threads, which else would copy all blocks that are left.
            copier.stop()
            raise
    return copier.result()


class _Copier:
    """The blocks still to be done, shared by the threads."""

    def __init__(
        self,
        source: TensorSource,
        writers: Sequence[BlockWriter],
        progress: Callable[[int], None] | None,
        part: int,
        parts: int,
    ) -> None:
        self._digests = {name: Digest() for writer in writers for name in writer.plan.tensors}
        self._source = source
        blocks = [*_blocks(writers)]
        # Consecutive blocks for each part: a rank reads and writes one stretch of each file.
        blocks = blocks[len(blocks) * part // parts : len(blocks) * (part + 1) // parts]
        self.count = len(blocks)
        self.nbytes = sum(box.numel * spec.dtype.itemsize for _, spec, _, box in blocks)
        self._blocks = iter(blocks)
        self._lost = LostValues()
        self._progress = progress
        self._lock = threading.Lock()
        self._stopped = False

    def work(self) -> None:
        # One for each thread, used again and again, so that it stays in cache.
        scratch = torch.empty(_BLOCK_BYTES, dtype=torch.uint8, device="cpu")
        try:
            while (block := self._next()) is not None:
                self._copy(*block, scratch)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Hand out no more blocks."""
        self._stopped = True

    def result(self) -> dict[str, Digest]:
        """Return the digests, when all is copied. Raises MismatchError if a planned dtype has no room for a value."""
        self._lost.refuse(self._source.path, "Nothing was written.")
        return self._digests

    def _next(self) -> Block | None:
        # An iterator must not be advanced by two threads at a time.
        with self._lock:
            return None if self._stopped else next(self._blocks, None)

    def _copy(self, writer: BlockWriter, spec: TensorSpec, first: int, box: Chunk, scratch: Tensor) -> None:
        values = _read(self._source, spec, box, scratch)
        if is_narrower(spec.dtype, self._source.specs[spec.name].dtype):
            self._lost.add(spec.name, values, lambda: self._uncast(spec.name, box))
        share = digest_run(values, first)
        writer.write_run(spec.name, first, values)
        with self._lock:
            # Two threads may have blocks of one tensor; adding up reads and writes the entry.
            self._digests[spec.name] += share
        if self._progress:
            self._progress(values.nbytes)

    def _uncast(self, name: str, box: Chunk) -> Tensor:
        memory = torch.empty(box.sizes, dtype=self._source.specs[name].dtype, device="cpu")
        return read_into(self._source, name, box, memory)


def _blocks(writers: Sequence[BlockWriter]) -> Iterator[Block]:
    """Every block of every file, in file order, so that reads and writes go forward."""
    for writer in writers:
        for placement in writer.plan.tensors.values():
            spec = placement.spec
            for first, box in row_major_blocks(spec.shape, _BLOCK_BYTES // spec.dtype.itemsize):
                yield writer, spec, first, box


def _read(source: TensorSource, spec: TensorSpec, box: Chunk, scratch: Tensor) -> Tensor:
    """The block in the planned dtype: a view on the source where it lies there as it is needed, else in ``scratch``."""
    if source.specs[spec.name].dtype == spec.dtype:
        pieces = list(source.pieces(spec.name, box))
        if len(pieces) == 1 and pieces[0][0] == box and pieces[0][1].is_contiguous():
            return pieces[0][1]
    out = scratch[: box.numel * spec.dtype.itemsize].view(spec.dtype).view(box.sizes)
    return read_into(source, spec.name, box, out)
