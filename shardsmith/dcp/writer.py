"""Write this rank's shards of a DCP directory through torch, digesting every byte and every tensor on the way."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_saver import save

from shardsmith.commit import writing
from shardsmith.digest import digest_box
from shardsmith.errors import WriteError
from shardsmith.metadata import FileRecord
from shardsmith.ranks import single_process_is_fine
from shardsmith.record.description import Measured
from shardsmith.tensors import Chunk


def write_shards(
    state_dict: Mapping[str, Any], directory: Path, attempt: str, process_group: dist.ProcessGroup | None
) -> Measured:
    """Write the local shards of a state dict into an empty directory; rank 0 also writes ``.metadata``.

    All ranks of the group call it. Communicates over the group (object collectives, so Gloo), from the calling thread.
    A replicated tensor is written by one rank. Every file was fsynced, except ``.metadata``.

    Args:
        state_dict: As for ``torch.distributed.checkpoint.save``; nested or flat. Not changed.
        attempt: Recorded in ``.metadata`` as its save id.
        process_group: None without ``torch.distributed``.

    Raises:
        WriteError: on every rank, when the write failed on any.
    """
    writer = _ShardWriter(directory, attempt)
    planner = _DigestingPlanner()
    try:
        with single_process_is_fine():
            save(dict(state_dict), storage_writer=writer, planner=planner, process_group=process_group)
    except CheckpointException as error:  # it derives from BaseException and would pass through `except Exception`
        causes = "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in sorted(error.failures.items()))
        raise WriteError(f"{directory}: torch.distributed.checkpoint could not write: {causes}") from error
    return Measured(writer.hashing.files, planner.measured.digests)


class _DigestingPlanner(DefaultSavePlanner):
    """Adds each box to its tensor's digest at the moment it is handed out to be written."""

    def __init__(self) -> None:
        super().__init__()
        self.measured = Measured()

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        data = super().resolve_data(write_item)
        if isinstance(data, Tensor) and write_item.tensor_data is not None:
            place = write_item.tensor_data
            box = Chunk(tuple(place.chunk.offsets), tuple(place.chunk.sizes))
            self.measured.add(write_item.index.fqn, digest_box(data, box, tuple(place.size)))
        return data


class _ShardWriter(FileSystemWriter):
    """One file a rank, one thread (errors of further threads would be lost), new files only, hashed as written."""

    def __init__(self, directory: Path, attempt: str) -> None:
        super().__init__(directory, single_file_per_rank=True, sync_files=True, thread_count=1, overwrite=False)
        self.hashing = self.fs = _HashingFileSystem()
        self._attempt = attempt

    def storage_meta(self) -> StorageMeta:
        """Without the path: it would be a temporary one, and is nobody's business."""
        return StorageMeta(checkpoint_id=None, save_id=self._attempt)


class _HashingFileSystem(FileSystem):
    """Files are made new, never through a link, and their hash is taken while they are written."""

    def __init__(self) -> None:
        self.files: dict[str, FileRecord] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with writing(Path(path), "write"), os.fdopen(descriptor, "wb") as file:
            stream = _HashingStream(file)
            try:
                yield stream
            except RuntimeError as error:  # torch's archive writer notices that bytes are missing, but not why
                raise stream.error or error from error
        self.files[Path(path).name] = FileRecord(size=stream.size, xxh3_128=stream.hash.hexdigest())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.files[Path(new_path).name] = self.files.pop(Path(path).name)


class _HashingStream(io.RawIOBase):
    """A file being written front to back."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file
        self.hash = xxhash.xxh3_128()
        self.size = 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.hash.update(data)
        try:
            written = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.size += written
        return written

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        self.flush()  # whoever asks wants to fsync, and an fsync before the flush would be worth nothing
        return self._file.fileno()
