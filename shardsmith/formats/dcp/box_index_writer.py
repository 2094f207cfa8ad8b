"""Writes ``.boxes``: what ``.metadata`` says, where a rank reads only what it loads. See docs/format.md."""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash

from shardsmith.formats.dcp.cuts import Cut, CutTensor
from shardsmith.formats.dcp.shard_files import Place
from shardsmith.formats.torch_files.archive_writer import MOST_BYTES, archive_layout
from shardsmith.tensors.checkpoint_keys import KeyPath
from shardsmith.tensors.dtypes import dtype_name

MAGIC = b"SHSBOX\r\n"
VERSION = 1
PREFIX = struct.Struct("<8sQ16s")
"""Magic, length of the head in bytes, XXH3-128 of the head."""
BLOCK = struct.Struct("<3Q16s")
"""Offset from the end of the head, stored bytes, bytes, XXH3-128 of the stored bytes. Of an absent block all zeros."""
ROW = np.dtype([("file", "<u4"), ("offset", "<u8")])
"""Where a box of a grid lies, if ``MAX_RUNS`` do not say it."""
# A run takes 40 bytes of its block, which a reader parses as a whole; a row takes 12 outside of it, read where wanted.
MAX_RUNS = 64
MAX_CUTS = 1024
MAX_EXPANSION = 256
"""Of a compressed block; what would be more is stored as it is."""
OF_RANK = re.compile(r"rank-(0|[1-9][0-9]{0,8})")
"""Second element of the path of what a rank has for itself alone."""


def write_box_index(
    tensors: Mapping[str, CutTensor],
    *,
    files: Sequence[str],
    containers: Mapping[str, KeyPath],
    objects: Mapping[str, Place],
) -> bytes:
    """Return the content of ``.boxes``. The arguments are those of ``write_index``."""
    writer = _Writer(files)
    for key, tensor in tensors.items():
        writer.add_tensor(key, containers.get(key, (key,)), tensor)
    for key, place in objects.items():
        writer.add_object(key, containers.get(key, (key,)), place)
    return writer.content()


@dataclass(slots=True)
class _Block:
    """Entries of one kind of keys, as they will be stored."""

    names: list[str] = field(default_factory=list)
    paths: list[KeyPath] = field(default_factory=list)
    layouts: dict[str, int] = field(default_factory=dict)
    """Dtype, shape and grid as JSON -> number."""
    rows: list[tuple[int, int, int, int]] = field(default_factory=list)
    runs: list[tuple[int, int, int, int, int]] = field(default_factory=list)

    def add(self, key: str, path: KeyPath, layout: int, at: int, count: int) -> None:
        # Most paths are the key divided at its first dots: then the number of dots is enough.
        code = len(path) - 1
        if tuple(key.split(".", code)) != tuple(path):
            self.paths.append(path)
            code = -len(self.paths)
        self.names.append(key)
        self.rows.append((code, layout, at, count))

    def content(self) -> bytes:
        layouts = [json.loads(text) for text in self.layouts]
        text = json.dumps(
            {"names": self.names, "paths": self.paths, "layouts": layouts, "runs": len(self.runs)},
            separators=(",", ":"),
        ).encode()
        numbers = [*(n for row in self.rows for n in row), *(n for run in self.runs for n in run)]
        return struct.pack("<Q", len(text)) + text + np.array(numbers, dtype="<i8").tobytes()


class _Writer:
    def __init__(self, files: Sequence[str]) -> None:
        self._files = files
        self._numbers = {name: i for i, name in enumerate(files)}
        self._blocks: dict[str, _Block] = {}
        self._of_ranks: dict[str, dict[int, _Block]] = {}
        self._layouts: dict[Cut, tuple[str, Any, Any]] = {}
        self._rows: list[bytes] = []
        self._rows_bytes = 0

    def add_tensor(self, key: str, path: KeyPath, tensor: CutTensor) -> None:
        block = self._block(key, path)
        # Most tensors of a model are cut up as others are.
        if tensor.cut not in self._layouts:
            self._layouts[tensor.cut] = _layout(tensor.cut)
        text, order, boxes = self._layouts[tensor.cut]
        layout = block.layouts.setdefault(text, len(block.layouts))
        files, offsets = tensor.files[order], tensor.offsets[order]
        if boxes is not None:
            rows = np.column_stack([boxes, files, offsets, tensor.cut.lengths[order]])
            block.add(key, path, layout, self._add_rows(rows.astype("<i8").tobytes()), len(order))
            return
        runs = _runs(files, offsets)
        if runs is None:
            # No lengths: _grid has checked that they follow from shape and dtype.
            places = np.empty(len(order), dtype=ROW)
            places["file"], places["offset"] = files, offsets
            block.add(key, path, layout, self._add_rows(places.tobytes()), 0)
            return
        block.add(key, path, layout, len(block.runs), len(runs))
        block.runs += runs

    def add_object(self, key: str, path: KeyPath, place: Place) -> None:
        block = self._block(key, path)
        block.add(key, path, -1, len(block.runs), 1)
        block.runs.append((place.length, self._numbers[place.file], 0, place.offset, 0))

    def content(self) -> bytes:
        at, body = self._rows_bytes, [*self._rows]

        def store(block: _Block) -> tuple[int, int, int, bytes]:
            nonlocal at
            raw = block.content()
            # Level 1: names of layers repeat so much that more effort gains little. A block that shrinks too well is
            # stored as it is, since readers refuse an expansion beyond MAX_EXPANSION.
            packed = zlib.compress(raw, 1)
            stored = packed if len(packed) * MAX_EXPANSION >= len(raw) > len(packed) else raw
            body.append(stored)
            at += len(stored)
            return at - len(stored), len(stored), len(raw), xxhash.xxh3_128_digest(stored)

        blocks = {name: store(block) for name, block in self._blocks.items()}
        families = {}
        for name, members in self._of_ranks.items():
            stored = {rank: store(block) for rank, block in members.items()}
            # Fixed size by rank, zeros for a rank without a block, so that a reader finds its entry by arithmetic.
            table = b"".join(
                BLOCK.pack(*stored[i]) if i in stored else bytes(BLOCK.size) for i in range(len(self._files))
            )
            families[name] = at
            body.append(table)
            at += len(table)
        head: dict[str, Any] = {
            "version": VERSION,
            "files": len(self._files) if _are_of_ranks(self._files) else list(self._files),
            "blocks": {name: [*numbers[:3], numbers[3].hex()] for name, numbers in blocks.items()},
            "ranks": families,
        }
        text = json.dumps(head, separators=(",", ":")).encode()
        return b"".join([PREFIX.pack(MAGIC, len(text), xxhash.xxh3_128_digest(text)), text, *body])

    def _block(self, key: str, path: KeyPath) -> _Block:
        top = str(path[0])
        if len(path) < 2 or not key.startswith(f"{top}."):
            return self._blocks.setdefault("", _Block())
        # Only where the key itself begins with the path, since a reader derives the block from the key alone.
        of_rank = OF_RANK.fullmatch(str(path[1]))
        if of_rank and int(of_rank[1]) < len(self._files) and f"{key}.".startswith(f"{top}.{path[1]}."):
            return self._of_ranks.setdefault(top, {}).setdefault(int(of_rank[1]), _Block())
        return self._blocks.setdefault(top, _Block())

    def _add_rows(self, rows: bytes) -> int:
        self._rows.append(rows)
        self._rows_bytes += len(rows)
        return self._rows_bytes - len(rows)


def rank_file_name(rank: int) -> str:
    """Name of the file of a rank in a save; if all are called so, their number says all of them."""
    return f"__{rank}_0.distcp"


def _are_of_ranks(files: Sequence[str]) -> bool:
    return all(name == rank_file_name(rank) for rank, name in enumerate(files))


def _layout(cut: Cut) -> tuple[str, Any, Any]:
    """Dtype, shape and grid of a cut as JSON; the numbers of its boxes, in the order of the grid; if they are no grid,
    offsets and sizes of each, else None.

    Boxes without elements are left out: a rank without rows has one, and no grid has a cell of size zero.
    """
    order = np.array([i for i, box in enumerate(cut.boxes) if box.numel], dtype=np.int64)
    rows = [(*cut.boxes[i].offsets, *cut.boxes[i].sizes) for i in order.tolist()]
    ndim = len(cut.shape)
    boxes = np.array(rows, dtype=np.int64).reshape(len(rows), 2 * ndim)
    grid = _grid(cut, boxes[:, :ndim], boxes[:, ndim:], cut.lengths[order]) if rows else None
    text = json.dumps([dtype_name(cut.dtype), cut.shape, grid and grid[0]], separators=(",", ":"))
    return (text, order, boxes) if grid is None else (text, order[np.argsort(grid[1])], None)


def _grid(cut: Cut, offsets: Any, sizes: Any, file_lengths: Any) -> tuple[list[list[list[int]]], Any] | None:
    """How often which size follows in each dimension, and the number of each box's cell; None if they are no grid."""
    cuts, cells, counts = [], np.zeros(len(offsets), dtype=np.int64), 1
    for dim, whole in enumerate(cut.shape):
        starts, first, cell = np.unique(offsets[:, dim], return_index=True, return_inverse=True)
        lengths = sizes[first, dim]
        # The cuts cover the dimension without a gap; every box between two cuts must be as long as the cell.
        is_tight = starts[0] == 0 and np.array_equal(starts + lengths, [*starts[1:], whole])
        pairs = _repeats(lengths)
        if not is_tight or len(pairs) > MAX_CUTS or not np.array_equal(lengths[cell], sizes[:, dim]):
            return None
        cuts.append(pairs)
        # Number of each box's cell in row-major order, a dimension at a time.
        cells = cells * len(starts) + cell
        counts *= len(starts)
    # Each cell has exactly one box: as many boxes as cells, and no cell twice.
    if len(cells) != counts or len(np.unique(cells)) != counts:
        return None
    return (cuts, cells) if _are_archives_of_ours(cut.dtype, sizes, file_lengths) else None


def _are_archives_of_ours(dtype: torch.dtype, sizes: Any, lengths: Any) -> bool:
    """Whether the length of each follows from its shape."""
    # A tensor has few different box sizes, whatever the number of ranks: one layout for each.
    kinds, number = np.unique(sizes, axis=0, return_inverse=True)
    shapes = [tuple(kind) for kind in kinds.tolist()]
    if any(torch.Size(shape).numel() * dtype.itemsize > MOST_BYTES for shape in shapes):
        return False
    expected = np.array([archive_layout(shape, dtype).length for shape in shapes], dtype=np.int64)
    return bool(np.array_equal(expected[number.reshape(-1)], lengths))


def _repeats(lengths: Any) -> list[list[int]]:
    """As pairs: a length, and how often it follows."""
    ends = [*(np.flatnonzero(np.diff(lengths)) + 1).tolist(), len(lengths)]
    return [[int(lengths[end - 1]), end - begin] for begin, end in zip([0, *ends], ends, strict=False)]


def _runs(files: Any, offsets: Any) -> list[tuple[int, int, int, int, int]] | None:
    """As boxes that follow each other with equal steps: count, file, step, offset, step. None if those are too many."""
    if len(files) > 2:
        # Steps unlike the one before.
        changes = np.flatnonzero((np.diff(files, 2) != 0) | (np.diff(offsets, 2) != 0)) + 1
    else:
        changes = np.empty(0, dtype=np.int64)  # two follow each other with one step, whatever it is
    runs: list[tuple[int, int, int, int, int]] = []
    at = 0
    while at < len(files):
        if len(runs) == MAX_RUNS:
            return None
        # A change at i means that the step from box i to i + 1 is another one: box i is the last of its run.
        later = changes[changes.searchsorted(at, side="right") :]
        end = int(later[0]) if len(later) else len(files) - 1
        steps = (int(files[at + 1] - files[at]), int(offsets[at + 1] - offsets[at])) if at < end else (0, 0)
        runs.append((end - at + 1, int(files[at]), steps[0], int(offsets[at]), steps[1]))
        at = end + 1
    return runs
