"""Reads ``.boxes``, which a load reads in place of ``.metadata``: of it only the keys and boxes that are wanted.

As with every index nothing in it is believed. What is wrong is an error when the entry at fault is looked at.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash

from shardsmith.errors import CorruptCheckpointError, IncompleteCheckpointError, UnsupportedFormatError
from shardsmith.formats.dcp import box_index_writer as written
from shardsmith.formats.dcp.box_blocks import Block, Entries, FilesOfRanks
from shardsmith.formats.dcp.box_grid import GridBoxes
from shardsmith.formats.dcp.index import (
    DcpEntry,
    DcpIndex,
    StoredChunk,
    StoredObject,
    read_index,
    require_plain_name,
    size_of_file,
)
from shardsmith.ground.json_budget import require_json_budget
from shardsmith.ground.layout import BOX_INDEX_FILE
from shardsmith.ground.mapped import MappedFile
from shardsmith.ground.remote_path import as_path
from shardsmith.manifest.fields import count, typed
from shardsmith.manifest.metadata import has_manifest, read_metadata
from shardsmith.sharding.boxes import find_overlap
from shardsmith.tensors.checkpoint_keys import KeyPath
from shardsmith.tensors.tensors import Chunk, TensorSpec

# Bounds on what a file of a stranger makes a reader allocate; a save of ours stays far below them.
_MAX_HEAD_BYTES = 1 << 24
_MAX_BLOCK_BYTES = 1 << 30
_MAX_CELLS = 1 << 24

_RANK_PART = re.compile(r"\.(?=rank-[0-9]{1,9}(?:\.|$))")

T = TypeVar("T")


def load_index(directory: str | Path, *, follow_links: bool = False) -> DcpIndex:
    """Return what a DCP directory holds, to load from: by ``.boxes`` if its manifest lists one, else by ``.metadata``.

    No communication. Args and errors are those of ``read_index``. By ``.boxes`` only the size of the files that are
    wanted is looked at, and what is wrong with an entry is raised when it is looked up.
    """
    path = as_path(directory)
    record = read_metadata(path).files.get(BOX_INDEX_FILE) if has_manifest(path) else None
    # Without a recorded hash nothing says that .boxes and .metadata are of the same save.
    if record is None or not (path / BOX_INDEX_FILE).exists():
        return read_index(path, follow_links=follow_links)
    file = MappedFile(path / BOX_INDEX_FILE, follow_links=follow_links)
    with contextlib.ExitStack() as opened:
        opened.callback(file.close)
        # Only the size: the head and each block have hashes of their own, so a rank verifies what it reads of it.
        if file.size != record.size:
            raise CorruptCheckpointError(file.path, f"has {file.size} bytes, expected {record.size}")
        index = _BoxIndexFile(path, file, _known_blocks(path, record.xxh3_128), follow_links).index()
        opened.pop_all()
        return index


def specs_of(index: DcpIndex) -> Mapping[str, TensorSpec]:
    """Return the specs of all tensors, by key."""
    if isinstance(index, BoxIndex):
        tensors = index.tensors
        return Entries(lambda key: _spec(tensors.get(key)), tensors.__contains__, lambda: iter(tensors))
    return {name: entry.spec for name, entry in index.tensors.items()}


@functools.lru_cache(maxsize=2)  # a resume opens the same index several times
# The hash is part of the key: a step that was replaced under the same name has other blocks.
def _known_blocks(path: Path, hash_of_file: str) -> dict[tuple[str, int | None], Block]:  # noqa: ARG001
    """A place for the blocks of a file that were read."""
    return {}


@dataclass(frozen=True, slots=True)
class BoxIndex(DcpIndex):
    """What a DCP directory holds, read entry by entry."""

    source: _BoxIndexFile

    def below(self, top: str) -> Iterator[tuple[str, KeyPath]]:
        """As ``DcpIndex.below``."""
        return self.source.below(top)

    def top_keys(self) -> set[str]:
        """As ``DcpIndex.top_keys``."""
        return self.source.top_keys()

    def is_of_rank(self, key: str) -> bool:
        """As ``DcpIndex.is_of_rank``."""
        return self.source.is_of_rank(key)

    def beside(self, tensors: Mapping[str, DcpEntry]) -> BoxIndex:
        """Return the same with tensors under flat keys that are in none of its files."""

        def tensor(key: str) -> DcpEntry | None:
            return tensors.get(key) or self.tensors.get(key)

        # Weights in Hugging Face files are always flat here, whatever the names of the DCP part look like.
        def path(key: str) -> KeyPath | None:
            return (key,) if key in tensors else self.containers.get(key)

        return replace(
            self,
            tensors=Entries(
                tensor, lambda key: key in tensors or key in self.tensors, lambda: chain(tensors, self.tensors)
            ),
            containers=Entries(
                path, lambda key: key in tensors or key in self.containers, lambda: chain(tensors, self.containers)
            ),
        )

    def close(self) -> None:
        """Close the file."""
        self.source.file.close()


class _BoxIndexFile:
    """The file, of which blocks are read once; its methods raise CheckpointError."""

    def __init__(
        self, directory: Path, file: MappedFile, blocks: dict[tuple[str, int | None], Block], follow_links: bool
    ) -> None:
        self.directory = directory
        self.file = file
        self._follow_links = follow_links
        self._read = blocks
        self._sizes: dict[str, int | None] = {}
        self._entries: dict[str, DcpEntry] = {}
        self._head = self.checked(self._read_head)

    def index(self) -> BoxIndex:
        return BoxIndex(
            self.directory,
            Entries(self.tensor, lambda key: self._is_there(key, True), lambda: self._keys(True)),
            Entries(self._object, lambda key: self._is_there(key, False), lambda: self._keys(False)),
            Entries(self._path, lambda key: self._find(key) is not None, lambda: self._keys(None)),
            Entries(self._size, lambda name: self._size(name) is not None, self._names_of_files),
            self,
        )

    def below(self, top: str) -> Iterator[tuple[str, KeyPath]]:
        # Without the flat keys, which come below: only a few of them can belong to this top.
        for block in self._blocks_below(top):
            for i, name in enumerate(block.names):
                yield name, self.checked(partial(block.path, i))
        # Keys whose path does not begin as the key does are among the flat ones, with a path of their own (code < 0).
        flat = self._block("", None)
        if flat is None:
            return
        for i in (i for i, code in enumerate(flat.rows.paths) if code < 0):
            path = self.checked(partial(flat.path, i))
            if path[0] == top:
                yield flat.names[i], path
        # A value at the top level itself: its key has no second element, so it has no block.
        if top in flat.numbers:
            yield top, (top,)

    def top_keys(self) -> set[str]:
        flat = self._block("", None)
        names = (*self._head["blocks"], *self._head["ranks"], *(flat.names if flat else ()))
        return {name.split(".", 1)[0] for name in names} - {""}

    def _keys(self, is_tensor: bool | None) -> Iterator[str]:
        # A dict and not a set: the order of the keys must be the same on all ranks.
        for top in {"": None, **self._head["blocks"], **self._head["ranks"]}:
            for block in self._blocks_below(top):
                for name, layout in zip(block.names, block.rows.layouts, strict=True):
                    if is_tensor is None or is_tensor == (layout >= 0):
                        yield name

    def _blocks_below(self, top: str) -> Iterator[Block]:
        # None is the block that all ranks share.
        members = range(len(self._files)) if top in self._head["ranks"] else ()
        for rank in (None, *members):
            block = self._block(top, rank)
            if block is not None:
                yield block

    def _find(self, key: str) -> tuple[Block, int] | None:
        """The block that has a key, and its number in it. ``a.b.c`` is in ``a.b``, in ``a`` or among the flat keys."""
        # Block names with a dot in them are rare: without any, one look at the part before the first dot is enough.
        dot = key.find(".")
        while dot >= 0:
            found = self._find_in(key[:dot], key)
            if found is not None:
                return found
            dot = key.find(".", dot + 1) if self._has_dots else -1
        return self._find_in("", key)

    def _find_in(self, top: str, key: str) -> tuple[Block, int] | None:
        # The usual case without a call: a resume asks for a key up to a million times.
        block = self._read.get((top, None))
        if block is None and top in self._head["blocks"]:
            block = self._block(top, None)
        if block is not None and (number := block.numbers.get(key)) is not None:
            return block, number
        if top not in self._head["ranks"]:
            return None
        of_rank = written.OF_RANK.fullmatch(key[len(top) + 1 :].split(".", 1)[0])
        block = self._block(top, int(of_rank[1])) if of_rank else None
        return (block, block.numbers[key]) if block is not None and key in block.numbers else None

    def _is_there(self, key: str, is_tensor: bool) -> bool:
        found = self._find(key)
        return found is not None and is_tensor == (found[0].rows.layouts[found[1]] >= 0)

    def _path(self, key: str) -> KeyPath | None:
        found = self._find(key)
        return found and self.checked(lambda: found[0].path(found[1]))

    def _object(self, key: str) -> StoredObject | None:
        found = self._find(key)
        if found is None or found[0].rows.layouts[found[1]] >= 0:
            return None

        def read() -> StoredObject:
            block, i = found
            # The run of an object has its length where the run of a tensor has the number of boxes.
            length, file, _, offset, _ = map(count, block.runs[count(block.rows.at[i])].tolist())
            return StoredObject(self._files[file], offset, length)

        place = self.checked(read)
        self._require(f"object {key!r}", place.file, place.offset + place.length)
        return place

    def tensor(self, key: str) -> DcpEntry | None:
        if key in self._entries:
            return self._entries[key]
        found = self._find(key)
        if found is None or found[0].rows.layouts[found[1]] < 0:
            return None
        return self._entries.setdefault(key, self.checked(lambda: self._entry(key, *found)))

    def is_of_rank(self, key: str) -> bool:
        # No block is read for this: a rank would otherwise read the blocks of all others to know what is theirs.
        tops = (key[: match.start()] for match in _RANK_PART.finditer(key))
        return any(top in self._head["ranks"] for top in tops)

    def _entry(self, key: str, block: Block, i: int) -> DcpEntry:
        number, at, count_ = block.rows.layouts[i], block.rows.at[i], block.rows.counts[i]
        layout = block.layout(number)
        spec = TensorSpec(key, layout.shape, layout.dtype)
        if layout.cuts is None:
            return DcpEntry(spec, self._irregular(spec, count(at), count(count_)))
        # cells is a product of counts from the file, and may be any number.
        if layout.cells > _MAX_CELLS:
            raise ValueError(f"{key!r} has {layout.cells} boxes")
        runs = block.runs[count(at) : at + count(count_)].tolist()
        # With count_ 0 the places are rows of the file, which are read when a box is asked for.
        if count_ and sum(count(run[0]) for run in runs) != layout.cells:
            raise ValueError(f"{key!r} has other boxes than its grid")
        return DcpEntry(spec, GridBoxes(self, spec, layout, runs, at))

    def _irregular(self, spec: TensorSpec, at: int, number: int) -> tuple[StoredChunk, ...]:
        """All boxes of a tensor, compared with each other as those of ``.metadata`` are."""
        ndim = len(spec.shape)
        # Offsets and sizes by dimension, then file, offset in it, length.
        width = 2 * ndim + 3
        data = self.read(at, 8 * width * number)
        rows = np.frombuffer(data, dtype="<i8").reshape(number, width).tolist() if number else []
        chunks = []
        for row in rows:
            numbers = [*map(count, row)]
            box = Chunk(tuple(numbers[:ndim]), tuple(numbers[ndim : 2 * ndim]))
            if not box.numel or any(a + n > m for a, n, m in zip(box.offsets, box.sizes, spec.shape, strict=True)):
                raise ValueError(f"{spec.name!r} of shape {spec.shape} has a box outside of it: {box}")
            file, offset, length = numbers[2 * ndim :]
            if length < box.numel * spec.dtype.itemsize:
                raise ValueError(f"{spec.name!r}: {length} bytes cannot hold the box {box}")
            chunks.append(StoredChunk(box, self._files[file], offset, length))
        boxes = [stored.chunk for stored in chunks]
        if find_overlap(boxes) or sum(box.numel for box in boxes) != spec.numel:
            raise ValueError(f"the boxes of {spec.name!r} overlap or leave holes")
        for one in chunks:
            self.require_stored(spec.name, one)
        return tuple(chunks)

    def file_name(self, number: int) -> str:
        """Raises IndexError or ValueError."""
        return self._files[count(number)]

    def require_stored(self, name: str, stored: StoredChunk) -> None:
        """Raise IncompleteCheckpointError if the file does not reach so far."""
        self._require(f"tensor {name!r}, box at {stored.chunk.offsets}", stored.file, stored.offset + stored.length)

    def read(self, at: int, nbytes: int) -> bytes:
        """Read a range, by its distance from the end of the head."""
        return self.file.bytes(self._body + at, nbytes)

    def _require(self, what: str, file: str, end: int) -> None:
        size = self._size(file)
        if size is None or size < end:
            fault = "is missing" if size is None else f"ends at byte {size}, not {end} or later"
            raise IncompleteCheckpointError(
                self.directory,
                f"{what}: its file {file} {fault}\nCopy the missing files again, or use another step.",
            )

    def _size(self, name: str) -> int | None:
        if name not in self._sizes:
            require_plain_name(self.file.path, name)
            self._sizes[name] = size_of_file(self.directory / name, self._follow_links)
        return self._sizes[name]

    def _names_of_files(self) -> Iterator[str]:
        return (name for name in self._files if self._size(name) is not None)

    def _read_head(self) -> dict[str, Any]:
        # Magic and length are checked first, so that no more than 16 MiB are read of a wrong file.
        magic, length, digest = written.PREFIX.unpack(self.file.bytes(0, written.PREFIX.size))
        if magic != written.MAGIC or length > _MAX_HEAD_BYTES:
            raise ValueError("it does not begin as one")
        text = self.file.bytes(written.PREFIX.size, length)
        self._body = written.PREFIX.size + length
        if xxhash.xxh3_128_digest(text) != digest:
            raise ValueError("its head has changed since it was written")
        require_json_budget(text)
        head: dict[str, Any] = typed(json.loads(text), dict)
        if head["version"] != written.VERSION:
            raise UnsupportedFormatError(self.file.path, f"has version {head['version']!r:.20}, this reads 1")
        names = head["files"]
        self._files: Sequence[str] = FilesOfRanks(names) if type(names) is int else [*map(_text, typed(names, list))]
        for what in ("blocks", "ranks"):
            typed(head[what], dict)
        # Only then can a key lie in a block whose name has more than one of its elements.
        self._has_dots = any("." in top for top in (*head["blocks"], *head["ranks"]))
        return head

    def _block(self, top: str, rank: int | None) -> Block | None:
        """The entries of a kind; of a rank's own those of that rank. None without any."""
        if (top, rank) not in self._read:
            place = self.checked(lambda: self._place(top, rank))
            if place is None:
                return None
            self._read[top, rank] = self.checked(lambda: self._parse(*place))
        return self._read[top, rank]

    def _place(self, top: str, rank: int | None) -> tuple[int, int, int, bytes] | None:
        if rank is None:
            if top not in self._head["blocks"]:
                return None
            at, stored, raw, digest = typed(self._head["blocks"][top], list)
            return count(at), count(stored), count(raw), bytes.fromhex(typed(digest, str))
        if rank >= len(self._files):
            return None
        # The table has one entry per rank, so a rank reads 40 bytes and its own block, whatever the number of ranks.
        row = self.read(count(self._head["ranks"][top]) + rank * written.BLOCK.size, written.BLOCK.size)
        at, stored, raw, digest = written.BLOCK.unpack(row)
        return (at, stored, raw, digest) if stored else None

    def _parse(self, at: int, stored: int, raw: int, digest: bytes) -> Block:
        # Before anything is decompressed: a small block must not become gigabytes.
        if not stored <= raw <= min(stored * written.MAX_EXPANSION, _MAX_BLOCK_BYTES):
            raise ValueError(f"{stored} bytes cannot be {raw}")
        data = self.read(at, stored)
        if xxhash.xxh3_128_digest(data) != digest:
            raise ValueError(f"the block at {at} has changed since it was written")
        if stored < raw:
            # The second argument bounds the output: what a stream has beyond the recorded size is never made.
            data = zlib.decompressobj().decompress(data, raw)
            if len(data) != raw:
                raise ValueError(f"the block at {at} is cut off")
        return Block.parse(data)

    def checked(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except (KeyError, IndexError, TypeError, ValueError, RecursionError, struct.error, zlib.error) as error:
            reason = f"is no index of boxes: {type(error).__name__}: {error!s:.300}"
            raise CorruptCheckpointError(self.file.path, reason) from error


def _spec(entry: DcpEntry | None) -> TensorSpec | None:
    return None if entry is None else entry.spec


def _text(value: Any) -> str:
    return str(typed(value, str))
