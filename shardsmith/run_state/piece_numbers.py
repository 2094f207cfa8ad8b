"""Which tensor each piece is of that a rank writes: what is added to its digest, for all ranks in little time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from shardsmith.formats.dcp import rank_file
from shardsmith.formats.dcp.rank_file import moved
from shardsmith.formats.torch_files.archive_writer import archive_layout
from shardsmith.run_state.described import Description, RankHolds
from shardsmith.run_state.weight_files import Placed
from shardsmith.sharding.holding import unpack_flags
from shardsmith.tensors.tensors import Chunk, TensorSpec


class FilePieces(NamedTuple):
    """What is in a rank's own file, in its order: tensors first, then the values that are none."""

    numbers: np.ndarray
    """Number of the tensor of each piece."""
    boxes: np.ndarray
    """Number of its box."""
    lengths: np.ndarray
    """Bytes of its archive."""
    objects: list[str]
    """Keys."""


class _Entries(NamedTuple):
    """What is known of each entry of a description; arrays."""

    tensors: np.ndarray
    """Number of the tensor, -1 for what is written as none."""
    is_weight: np.ndarray
    """Whether it is in weight files."""
    numels: np.ndarray
    kinds: np.ndarray
    """Number of its dtype in ``dtypes``."""
    is_object: np.ndarray
    dtypes: list[torch.dtype | None]


class PieceNumbers:
    """The order of ``OwnFile.pieces`` for any rank, without making them."""

    def __init__(self, specs: Sequence[TensorSpec], placed: Placed) -> None:
        """Tensors are numbered in the order of ``specs``."""
        self._numbers = {spec.name: number for number, spec in enumerate(specs)}
        self._placed = placed
        self._known: dict[Description, _Entries] = {}

    def of(self, held: RankHolds, writes: str) -> np.ndarray:
        """Return the number of the tensor of each piece; ``writes`` as ``pack_flags`` gave it."""
        known, entries, positions, _ = self._chosen(held, writes)
        found: np.ndarray = known.tensors[entries]
        largest = max((box.numel for boxes in held.lists for box in boxes), default=0)
        if largest * max((dtype.itemsize for dtype in known.dtypes if dtype), default=0) <= rank_file.MOST_BYTES:
            return found
        # A large box is several pieces.
        kinds, kind = self._kinds(known, held, entries, positions)
        counts = np.array([sum(1 for _ in rank_file.split(*one)) for one in kinds], dtype=np.int64)
        return np.repeat(found, counts[kind])

    def in_file(self, held: RankHolds, writes: str, number_of: Callable[[Chunk], int]) -> FilePieces:
        """Return what of that is in the rank's own file. ``number_of`` numbers boxes."""
        known, entries, positions, objects = self._chosen(held, writes)
        mine = ~known.is_weight[entries]
        entries, positions = entries[mine], positions[mine]
        kinds, kind = self._kinds(known, held, entries, positions)
        pieces = [[(moved(part, box), dtype) for part in rank_file.split(box, dtype)] for box, dtype in kinds]
        counts = np.array([len(parts) for parts in pieces], dtype=np.int64)
        flat = [(number_of(box), archive_layout(box.sizes, dtype).length) for parts in pieces for box, dtype in parts]
        boxes, lengths = np.array(flat, dtype=np.int64).reshape(-1, 2).T
        # Of each piece, where it is in `flat`: where its kind begins there, and which of the pieces of that it is.
        ends = np.cumsum(counts[kind])
        inside = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts[kind], counts[kind])
        where = np.repeat((np.cumsum(counts) - counts)[kind], counts[kind]) + inside
        keys = [held.entry(number).key for number in objects.tolist()]
        return FilePieces(np.repeat(known.tensors[entries], counts[kind]), boxes[where], lengths[where], keys)

    def _chosen(self, held: RankHolds, writes: str) -> tuple[_Entries, np.ndarray, np.ndarray, np.ndarray]:
        """Of each box that the rank writes its entry, and which of the entry's boxes it is; entries of what is none."""
        known = self._of_entries(held)
        counts = held.counts()
        # A row for each box that the rank holds: the number of its entry, and which of the entry's boxes it is.
        entries = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(len(entries)) - np.repeat(np.cumsum(counts) - counts, counts)
        flags = unpack_flags(writes, len(entries))
        objects = entries[flags & known.is_object[entries]]
        # Those that it writes, of what is a tensor.
        mine = flags & (known.tensors[entries] >= 0)
        entries, positions = entries[mine], positions[mine]
        # Weights come before what is in the rank's file, and parts of tensors before whole ones.
        is_whole = self._numels(held, entries, positions) == known.numels[entries]
        # 0 to 3: weights in parts, whole weights, others in parts, whole others. Stable, as the sort of `OwnFile.of`.
        order = np.argsort(np.where(known.is_weight[entries], 0, 2) + is_whole, kind="stable")
        return known, entries[order], positions[order], objects

    def _of_entries(self, held: RankHolds) -> _Entries:
        if held.description not in self._known:
            entries = held.description.entries
            found = [self._of_key(entry.key) for entry in entries]
            dtypes = [*dict.fromkeys(entry.dtype for entry in entries)]
            self._known[held.description] = _Entries(
                np.array([number for number, _ in found], dtype=np.int64),
                np.array([is_weight for _, is_weight in found], dtype=bool),
                np.array([math.prod(entry.shape or ()) for entry in entries], dtype=np.int64),
                np.array([dtypes.index(entry.dtype) for entry in entries], dtype=np.int64),
                np.array([entry.shape is None for entry in entries], dtype=bool),
                dtypes,
            )
        known = self._known[held.description]
        if own := held.description.kind.own:
            # Keys of what is a rank's own are other ones on each rank.
            known = known._replace(tensors=known.tensors.copy(), is_weight=known.is_weight.copy())
            for i in own:
                known.tensors[i], known.is_weight[i] = self._of_key(held.entry(i).key)
        return known

    def _of_key(self, key: str) -> tuple[int, bool]:
        return -1 if key in self._placed.tied else self._numbers.get(key, -1), key in self._placed.written

    @staticmethod
    def _numels(held: RankHolds, entries: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Of how many elements each box is."""
        counts = np.array([len(boxes) for boxes in held.lists], dtype=np.int64)
        numels = np.array([box.numel for boxes in held.lists for box in boxes], dtype=np.int64)
        # Where the boxes of each list begin among all boxes.
        starts = np.cumsum(counts) - counts
        found: np.ndarray = numels[starts[held.description.kind.numbers[entries]] + positions]
        return found

    @staticmethod
    def _kinds(
        known: _Entries, held: RankHolds, entries: np.ndarray, positions: np.ndarray
    ) -> tuple[list[tuple[Chunk, torch.dtype]], np.ndarray]:
        """Return the different boxes, each with a dtype, and the number of each entry's: a rank has few of them."""
        counts = np.array([len(boxes) for boxes in held.lists], dtype=np.int64)
        flat = [box for boxes in held.lists for box in boxes]
        number = (np.cumsum(counts) - counts)[held.description.kind.numbers[entries]] + positions
        codes = number * len(known.dtypes) + known.kinds[entries]
        # Instead of np.unique, which sorts as many numbers as the rank has boxes.
        is_met = np.zeros(len(flat) * len(known.dtypes), dtype=bool)
        is_met[codes] = True
        rows = [divmod(one, len(known.dtypes)) for one in np.flatnonzero(is_met).tolist()]
        found = [(flat[box], dtype) for box, number in rows if (dtype := known.dtypes[number]) is not None]
        return found, (np.cumsum(is_met) - 1)[codes]


def add_digests(sums: np.ndarray, numbers: np.ndarray, digests: np.ndarray) -> None:
    """Add digests to those of their tensors, mod 2**64. Shapes (tensors, 2), (pieces,), (pieces, 2)."""
    if (np.diff(numbers) > 0).all():  # the usual case, in which no tensor is met twice
        sums[numbers] += digests
    else:
        # Unlike `sums[numbers] +=`, this adds each of several digests of one tensor.
        np.add.at(sums, numbers, digests)
