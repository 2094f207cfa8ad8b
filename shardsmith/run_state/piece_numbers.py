"""Which tensor each piece is of that a rank writes: what is added to its digest, for all ranks in little time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from shardsmith.formats.dcp import rank_file
from shardsmith.run_state.described import Description, RankHolds
from shardsmith.run_state.weight_files import Placed
from shardsmith.sharding.holding import unpack_flags
from shardsmith.tensors.tensors import TensorSpec


class PieceNumbers:
    """The order of ``OwnFile.pieces`` for any rank, without making them."""

    def __init__(self, specs: Sequence[TensorSpec], placed: Placed) -> None:
        """Tensors are numbered in the order of ``specs``."""
        self._numbers = {spec.name: number for number, spec in enumerate(specs)}
        self._placed = placed
        self._known: dict[Description, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = {}

    def of(self, held: RankHolds, writes: str) -> np.ndarray:
        """Return the number of the tensor of each piece; ``writes`` as ``pack_flags`` gave it."""
        numbers, is_weight, itemsizes, numels = self._of_entries(held)
        counts = held.counts()
        # A row for each box that the rank holds: the number of its entry, and which of the entry's boxes it is.
        entries = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(len(entries)) - np.repeat(np.cumsum(counts) - counts, counts)
        # Those that it writes, of what is a tensor.
        mine = unpack_flags(writes, len(entries)) & (numbers[entries] >= 0)
        entries, positions = entries[mine], positions[mine]
        # Weights come before what is in the rank's file, and parts of tensors before whole ones.
        is_whole = self._numels(held, entries, positions) == numels[entries]
        # 0 to 3: weights in parts, whole weights, others in parts, whole others. Stable, as the sort of `OwnFile.of`.
        order = np.argsort(np.where(is_weight[entries], 0, 2) + is_whole, kind="stable")
        entries, positions = entries[order], positions[order]
        # A large box is several pieces.
        return np.repeat(numbers[entries], self._parts(held, itemsizes, entries, positions))

    def _of_entries(self, held: RankHolds) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """By entry: the number of its tensor, -1 for what is written as none; whether it is in weight files; the bytes
        of an element; the number of elements."""
        if held.description not in self._known:
            entries = held.description.entries
            sizes = [0 if entry.dtype is None else entry.dtype.itemsize for entry in entries]
            numbers, weights = (
                zip(*(self._of_key(entry.key) for entry in entries), strict=True) if entries else ((), ())
            )
            self._known[held.description] = (
                np.array(numbers, dtype=np.int64),
                np.array(weights, dtype=bool),
                np.array(sizes, dtype=np.int64),
                np.array([math.prod(entry.shape or ()) for entry in entries], dtype=np.int64),
            )
        of_tensors, is_weight, itemsizes, numels = self._known[held.description]
        if own := held.description.kind.own:
            # Keys of what is a rank's own are other ones on each rank.
            of_tensors, is_weight = of_tensors.copy(), is_weight.copy()
            for i in own:
                of_tensors[i], is_weight[i] = self._of_key(held.entry(i).key)
        return of_tensors, is_weight, itemsizes, numels

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
    def _parts(held: RankHolds, itemsizes: np.ndarray, entries: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Of how many pieces each box is."""
        lists = held.description.kind.numbers[entries]
        numels = np.array([max((box.numel for box in boxes), default=0) for boxes in held.lists], dtype=np.int64)
        parts = np.ones(len(entries), dtype=np.int64)
        # Boxes above this size are cut into pieces. There are few, so these are looked at one by one.
        for i in np.flatnonzero(numels[lists] * itemsizes[entries] > rank_file.MOST_BYTES).tolist():
            box, dtype = held.lists[lists[i]][positions[i]], held.description.entries[entries[i]].dtype
            assert dtype is not None
            parts[i] = sum(1 for _ in rank_file.split(box, dtype))
        return parts


def add_digests(sums: np.ndarray, numbers: np.ndarray, digests: np.ndarray) -> None:
    """Add digests to those of their tensors, mod 2**64. Shapes (tensors, 2), (pieces,), (pieces, 2)."""
    if (np.diff(numbers) > 0).all():  # the usual case, in which no tensor is met twice
        sums[numbers] += digests
    else:
        # Unlike `sums[numbers] +=`, this adds each of several digests of one tensor.
        np.add.at(sums, numbers, digests)
