"""The tensors of a DCP directory."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from shardsmith.errors import CheckpointNotFoundError, CorruptCheckpointError, UsageError
from shardsmith.formats.dcp.box_grid import GridBoxes, finder_of
from shardsmith.formats.dcp.box_index import load_index, specs_of
from shardsmith.formats.dcp.index import DcpIndex, StoredChunk, read_index
from shardsmith.formats.torch_files.archive import read_archived_object, read_archived_tensor
from shardsmith.ground.file_tensor import FileTensor
from shardsmith.ground.mapped import MappedFile
from shardsmith.sharding.boxes import BoxFinder
from shardsmith.tensors.tensors import Chunk, TensorSpec

_CACHED_CHUNKS = 4096


class DcpSource:
    """The tensors of a DCP directory, read box by box: a ``TensorSource``.

    Opening reads and checks the index. Thread-safe; needs no process group.

    Attributes:
        index: What the directory holds.
    """

    def __init__(self, path: str | Path, *, follow_links: bool = False, to_load: bool = False) -> None:
        """Open a directory. Raises what ``read_index`` raises; see there for ``follow_links`` too.

        With ``to_load`` of a save of ours only the entries are read that are asked for; see ``load_index``.
        """
        read = load_index if to_load else read_index
        self.index: DcpIndex = read(path, follow_links=follow_links)
        self.path = self.index.path
        self.specs: Mapping[str, TensorSpec] = specs_of(self.index)
        self._follow_links = follow_links
        self._files: dict[str, MappedFile] = {}
        self._finders: dict[str, tuple[BoxFinder | GridBoxes, Sequence[StoredChunk]]] = {}
        # Protects _files and _closed. Finders and chunks need none: two threads that make the same one make equal ones.
        self._lock = threading.Lock()
        self._closed = False
        # Writers read a tensor block by block: the archive around it need not be looked at each time.
        self._chunk = functools.lru_cache(maxsize=_CACHED_CHUNKS)(self._read_chunk)

    def pieces(self, name: str, box: Chunk) -> Iterator[tuple[Chunk, Tensor]]:
        """The stored parts of ``box``: each with its place in the global tensor and its values, never to be written to.

        Raises:
            CheckpointNotFoundError: when there is no such tensor.
            CorruptCheckpointError: when the bytes of a chunk are not what the index says.
        """
        for i, stored, part in self.stored(name, box):
            yield part, self._chunk(name, i)[part.within(stored.chunk)]

    def is_elsewhere(self, name: str) -> bool:  # noqa: ARG002
        """Return whether a tensor is in no file that the index names, and ``stored`` knows nothing of it."""
        return False

    def stored(self, name: str, box: Chunk) -> Iterator[tuple[int, StoredChunk, Chunk]]:
        """Yield the chunks that share something with ``box``: number, place, and the part that they share.

        Raises:
            CheckpointNotFoundError: when there is no such tensor.
        """
        finder = self._finders.get(name)
        if finder is None:
            entry = self.index.tensors.get(name)
            if entry is None:
                raise CheckpointNotFoundError(self.path, f"has no tensor named {name!r}")
            # Made at the first use: with .boxes, to look an entry up may read a block.
            finder = self._finders.setdefault(name, (finder_of(entry.chunks), entry.chunks))
        for i, part in finder[0].meeting(box):
            yield i, finder[1][i], part

    def read_object(self, key: str, *, allow_pickle: bool = False) -> Any:
        """Return a value that is no tensor, such as a learning rate or the state of a data loader.

        Args:
            key: Key of the value in the index.
            allow_pickle: Read values of any type, **which runs whatever code they hold**.

        Raises:
            CheckpointNotFoundError: when there is no such value.
            UnsafeCheckpointError: when it is of a type that is not known to be safe, and ``allow_pickle`` is off.
            CorruptCheckpointError: when its bytes are damaged.
        """
        place = self.index.objects.get(key)
        if place is None:
            raise CheckpointNotFoundError(self.path, f"has no object named {key!r}")
        return read_archived_object(self._file(place.file), place.offset, place.length, allow_pickle=allow_pickle)

    def check_archives(self) -> None:
        """Open every chunk, without reading its payload.

        Raises:
            CheckpointError: one is no archive of such a tensor.
        """
        for name, entry in self.index.tensors.items():
            for i in range(len(entry.chunks)):
                self._read_chunk(name, i)

    def close(self) -> None:
        """Close the files. Tensors that were read stay valid. A second call does nothing."""
        # Closed first: a read in another thread then gets a UsageError and does not open the file again.
        with self._lock:
            self._closed = True
            for file in self._files.values():
                file.close()
            self._files.clear()
        self.index.close()
        self._chunk.cache_clear()

    def _read_chunk(self, name: str, i: int) -> FileTensor | Tensor:
        stored: StoredChunk = self.index.tensors[name].chunks[i]
        file = self._file(stored.file)
        values = read_archived_tensor(file, stored.offset, stored.length)
        expected, found = (stored.chunk.sizes, self.specs[name].dtype), (tuple(values.shape), values.dtype)
        if found != expected:
            where = f"the chunk of {name!r} at {stored.chunk.offsets} (byte {stored.offset})"
            raise CorruptCheckpointError(file.path, f"{where} has {found}, but the index says {expected}")
        return values

    def _file(self, name: str) -> MappedFile:
        with self._lock:
            if self._closed:
                raise UsageError(f"{self.path}: was closed; open it again to read from it")
            if name not in self._files:
                self._files[name] = MappedFile(self.path / name, follow_links=self._follow_links)
            return self._files[name]
