"""How the tensors of an index are cut: those that are cut alike share one description, so that it is looked at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from shardsmith.formats.dcp.shard_files import Place, PlannedChunk
from shardsmith.tensors.tensors import Chunk, Shape, TensorSpec


@dataclass(frozen=True, eq=False, slots=True)
class Cut:
    """The boxes of a tensor in the order of the index. Equal to itself alone: what is known of it is kept by it."""

    dtype: torch.dtype
    shape: Shape
    """Global shape."""
    boxes: Sequence[Chunk]
    lengths: np.ndarray
    """Bytes of the archive of each box; int64."""


class CutTensor(NamedTuple):
    """Where the boxes of one tensor lie."""

    cut: Cut
    files: np.ndarray
    """Number of the file of each box."""
    offsets: np.ndarray
    """Of its archive in that, in bytes; int64."""


class Cuts:
    """Finds the cut of each tensor among those of others."""

    def __init__(self) -> None:
        self._boxes: list[Chunk] = []
        self._numbers: dict[Chunk, int] = {}
        self._known: dict[tuple[torch.dtype, Shape, bytes], Cut] = {}

    def number(self, box: Chunk) -> int:
        """Return the number by which ``cut`` knows a box."""
        number = self._numbers.setdefault(box, len(self._boxes))
        if number == len(self._boxes):
            self._boxes.append(box)
        return number

    def cut(self, dtype: torch.dtype, shape: Shape, numbers: np.ndarray, lengths: np.ndarray) -> Cut:
        """Return the cut of a tensor: one object for all that have the same ``numbers`` of boxes and ``lengths``."""
        # A hash: where replicas share the writing, hardly two tensors are cut alike, and there are as many keys.
        boxes = xxhash.xxh3_128_digest(numbers.astype(np.int64).tobytes() + lengths.astype(np.int64).tobytes())
        key = dtype, tuple(shape), boxes
        if key not in self._known:
            found = [self._boxes[number] for number in numbers.tolist()]
            self._known[key] = Cut(dtype, tuple(shape), found, lengths)
        return self._known[key]


def cut_tensors(
    specs: Mapping[str, TensorSpec],
    chunks: Sequence[PlannedChunk],
    places: Mapping[int, Place],
    files: Sequence[str],
) -> dict[str, CutTensor]:
    """Return by key how each tensor is cut and where its boxes lie.

    Args:
        specs: By key.
        chunks: The planned chunks of all of them.
        places: Number of a chunk -> where it lies in the files.
        files: Names of those.
    """
    number_of = {name: number for number, name in enumerate(files)}
    chunks_of: dict[str, list[int]] = {key: [] for key in specs}
    for i, chunk in enumerate(chunks):
        chunks_of[chunk.key].append(i)
    cuts, found = Cuts(), {}
    for key, mine in chunks_of.items():
        rows = [(cuts.number(chunks[i].box), number_of[places[i].file]) for i in mine]
        numbers, where = np.array(rows, dtype=np.int64).reshape(-1, 2).T
        lengths, offsets = (np.array([getattr(places[i], name) for i in mine], dtype=np.int64) for name in _COLUMNS)
        found[key] = CutTensor(cuts.cut(specs[key].dtype, specs[key].shape, numbers, lengths), where, offsets)
    return found


_COLUMNS = ("length", "offset")
