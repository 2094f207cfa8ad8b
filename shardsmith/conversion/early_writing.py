"""Shards that are written while transformers is still being imported: half of what a small conversion takes.

The bytes of a checkpoint do not depend on the names of its tensors, and those of most models are the names in their
files. So a child process, which has none of the imports, writes every tensor of the files, while this one makes the
model. Then either the tensors are the model's, or what was written is thrown away; nothing is visible before.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from shardsmith.errors import CheckpointError, WriteError
from shardsmith.formats.by_path import open_source
from shardsmith.formats.dcp.shard_files import PlannedChunk, Stream, Written, plan_chunks, write_shard_files
from shardsmith.formats.models import ModelSource
from shardsmith.ground.commit import Attempt, refuse_existing, require_space, sweep
from shardsmith.ground.remote_path import RemotePath
from shardsmith.hf.hf_directory import CONFIG_FILE, protect
from shardsmith.tensors.dtypes import cast_specs
from shardsmith.tensors.narrowing import is_narrower

_EXPERT = re.compile(r"\.experts\.\d+\.")
"""In files; in memory, transformers fuses them, so the names alone tell that this is no case for us."""
_REPORT_BYTES = 64 << 20
_MOST_WASTE = 1 << 20
"""Bytes that may be in the shards and not in the index: old versions of transformers saved some buffers, too."""


@dataclass(frozen=True, slots=True)
class EarlyWriting:
    """A child that writes the tensors of a model's files into an attempt's directory."""

    attempt: Attempt
    nbytes: int
    _specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    _chunks: Sequence[PlannedChunk]
    _child: Any
    _connection: Connection

    def finish(
        self, streams: Mapping[str, Stream], chunks: Sequence[PlannedChunk], progress: Callable[[int], None] | None
    ) -> tuple[Written, int] | None:
        """Wait for the child; what it wrote of the planned chunks, of which all from a number on are still to do.

        None if the plan is another than the child thought. Then nothing is left of what it wrote.

        Raises:
            CheckpointError, WriteError: what failed in the child.
        """
        # Chunks lie in the order of the tensors, and heads come last: all before ``done`` are in the files as planned.
        done = next((i for i, chunk in enumerate(chunks) if not self._has(streams[chunk.key])), len(chunks))
        used = {streams[chunk.key].name for chunk in chunks[:done]}
        # Bytes in the shards that no index will name.
        wasted = sum(chunk.nbytes for chunk in self._chunks if chunk.key not in used)
        # A planned tensor that the child has, but behind one that it
        # lacks, would be written twice: give up the early part.
        if not done or wasted > _MOST_WASTE or any(self._has(streams[chunk.key]) for chunk in chunks[done:]):
            # First end the child: it could make a file after the others were deleted.
            self.stop()
            for file in self.attempt.directory.iterdir():
                file.unlink()
            return None
        written = self._receive(progress)
        # The child numbered its own chunks, of all tensors of the
        # files; the plan numbers those of the model, in its order.
        numbers = {(chunk.key, chunk.first): i for i, chunk in enumerate(self._chunks)}
        renamed = Written(written.measured)
        names = {chunk.key: streams[chunk.key].name for chunk in chunks[:done]}
        for i, chunk in enumerate(chunks[:done]):
            renamed.places[i] = written.places[numbers[names[chunk.key], chunk.first]]
        # Before the clear below: ``renamed`` shares ``measured`` with ``written``. The files' hashes stay as they are.
        digests = {key: written.measured.digests[name] for key, name in names.items()}
        renamed.measured.digests.clear()
        renamed.measured.digests.update(digests)
        return renamed, done

    def stop(self) -> None:
        """End the child, whatever it does."""
        self._child.kill()
        self._child.join()

    def _has(self, stream: Stream) -> bool:
        """Whether the child writes this tensor as it is planned: from the files as they are, in that dtype."""
        of_files = isinstance(stream.source, ModelSource)
        return of_files and self._specs.get(stream.name) == (stream.spec.shape, stream.spec.dtype)

    def _receive(self, progress: Callable[[int], None] | None) -> Written:
        try:
            # Until "done" or "error"; EOFError comes when the child has
            # ended, since this process closed its copy of the other end.
            while True:
                kind, value = self._connection.recv()
                if kind == "bytes" and progress:
                    progress(value)
                if kind == "error":
                    raise value
                if kind == "done":
                    return Written(*value)
        except EOFError as error:
            self._child.join()
            code = self._child.exitcode
            raise WriteError(f"{self.attempt.directory}: the process that wrote it ended with {code}") from error


@contextlib.contextmanager
def early_writing(directory: Path, output: Path, dtype: torch.dtype | None) -> Iterator[EarlyWriting | None]:
    """Within it a child writes; None where that would be in vain, or is not possible here.

    Raises:
        ProtectedPathError, TargetExistsError: the output is no place to write to.
    """
    protect(output, directory)
    refuse_existing(output)
    files = None if isinstance(output, RemotePath) else _files(directory, dtype)
    if files is None:
        yield None
        return
    specs = {spec.name: spec for spec in cast_specs([*files.specs.values()], dtype)}
    chunks = plan_chunks(specs.values())
    # The specs have the planned dtype, so that a cast happens here as it would in the ordinary way.
    streams = {name: Stream(spec, files, name) for name, spec in specs.items()}
    nbytes = sum(spec.nbytes for spec in specs.values())
    sweep(output.parent)
    with Attempt(output) as attempt:
        # Before the fork: a full disk is reported at once, in this process.
        require_space(attempt.directory, nbytes)
        here, there = multiprocessing.Pipe(duplex=False)
        # A fork, and no new interpreter: the child starts at once,
        # with the mapped files, and nothing has to be pickled.
        child = multiprocessing.get_context("fork").Process(
            target=_write, args=(there, here, streams, chunks, attempt.directory), daemon=True
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which we have none of
            child.start()
        # Else ``recv`` would wait for ever for a child that was killed: the pipe ends with its last writing end.
        there.close()
        shapes = {name: (spec.shape, spec.dtype) for name, spec in specs.items()}
        early = EarlyWriting(attempt, nbytes, shapes, chunks, child, here)
        try:
            yield early
        finally:
            # Before the attempt deletes its directory: nobody may write into it any longer.
            early.stop()
            here.close()
            files.close()


def _files(directory: Path, dtype: torch.dtype | None) -> ModelSource | None:
    """The files, if their tensors are most likely those of the model, and if this process can be forked safely."""
    # Ranks divide the writing among themselves, and a process with a process group must not be forked.
    ranks = int(os.environ.get("WORLD_SIZE", "1")) > 1 or torch.distributed.is_initialized()
    if isinstance(directory, RemotePath):  # the client of a store has threads, which must not be forked
        return None
    # A fork has the calling thread alone: a lock that another one holds would stay locked in the child.
    if ranks or threading.active_count() > 1 or not (directory / CONFIG_FILE).is_file():
        return None
    try:
        files = open_source(directory)
    except CheckpointError:
        return None  # the plan says it, and better
    # Here the files' tensors are not those of the model, so all of what a child writes would be thrown away. And only
    # the plan knows which tensors are cast, so that a dtype without room for their values can be refused.
    is_narrowed = dtype is not None and any(is_narrower(dtype, spec.dtype) for spec in files.specs.values())
    if is_narrowed or any(_EXPERT.search(name) for name in files.specs):
        files.close()
        return None
    return files


def _write(
    connection: Connection,
    other_end: Connection,
    streams: Mapping[str, Stream],
    chunks: Sequence[PlannedChunk],
    directory: Path,
) -> None:
    """In the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it, too, and ends this process
    os.nice(3)  # its imports take longer than this, and run on one core only
    other_end.close()  # so that a write fails when the parent is gone
    reports = _Reports(connection)
    try:
        written = write_shard_files(streams, chunks, range(len(chunks)), directory, 0, reports.add)
        reports.flush()
        connection.send(("done", (written.measured, written.places)))
    except BrokenPipeError:
        return
    except Exception as error:
        connection.send(("error", error))


class _Reports:
    """Tells the parent of the bytes written, now and then. Called from several threads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._nbytes = 0

    def add(self, nbytes: int) -> None:
        # Under the lock: messages of two threads would mix in the pipe.
        with self._lock:
            self._nbytes += nbytes
            if self._nbytes >= _REPORT_BYTES:
                self._send()

    def flush(self) -> None:
        with self._lock:
            self._send()

    def _send(self) -> None:
        self._connection.send(("bytes", self._nbytes))
        self._nbytes = 0
