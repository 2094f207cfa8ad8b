"""Which of the ranks that hold the same box writes it, for all such boxes of a model at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

Holders = Sequence[tuple[int, int]]
"""The ranks that hold a box, in order, and the position of the box in their lists."""
_NONE = np.zeros(0, dtype=np.int64)


class SharedBoxes:
    """Boxes that several ranks hold. Each goes to the rank with the least to write so far, the largest first."""

    def __init__(self) -> None:
        self._ranks: list[np.ndarray] = []  # by box, of all tensors of a group
        self._positions: list[np.ndarray] = []
        self._sets: list[int] = []
        self._groups: list[int] = []
        self._numbers: dict[tuple[int, ...], int] = {}  # by set of ranks
        self._entries: list[Callable[[int], np.ndarray]] = []  # by group
        self._sizes: dict[
            tuple[int, int], int
        ] = {}  # numbers of pairs of ledger and bytes below 0, so that sorting is by the largest
        # Of each box of each tensor, in arrays by box of the group: the number of its size, where it comes in the order
        # in which ranks hold things, and the position of its tensor in the group.
        self._size_of: list[np.ndarray] = []
        self._turns: list[np.ndarray] = []
        self._tensors: list[np.ndarray] = []

    def add(
        self,
        ledger: int,
        boxes: Sequence[tuple[int, Holders]],
        itemsizes: Sequence[int],
        entries: Callable[[int], np.ndarray],
    ) -> None:
        """Add boxes that each tensor of a group has.

        Args:
            ledger: For which of the loads they count.
            boxes: Number of elements of each box, and who holds it.
            itemsizes: Bytes of an element of each tensor.
            entries: Returns by rank the position of each tensor in what the rank holds.
        """
        different, which = np.unique(np.array(itemsizes, dtype=np.int64), return_inverse=True)
        tensors = np.arange(len(itemsizes), dtype=np.int32)
        for numel, holders in boxes:
            ranks, positions = zip(*holders, strict=True)
            numbers = [self._sizes.setdefault((ledger, -numel * one), len(self._sizes)) for one in different.tolist()]
            self._size_of.append(np.array(numbers, dtype=np.int32)[which])
            # Rank, then tensor, then position in the list: 2**18, 2**27 and 2**18 of them at most.
            self._turns.append((ranks[0] << 45) + (entries(ranks[0]) << 18) + positions[0])
            self._tensors.append(tensors)
            self._ranks.append(np.array(ranks, dtype=np.int64))
            self._positions.append(np.array(positions, dtype=np.int64))
            self._sets.append(self._numbers.setdefault(ranks, len(self._numbers)))
            self._groups.append(len(self._entries))
        self._entries.append(entries)

    def choose(self, loads: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield ranks, each with the positions of tensors and, in their lists, of boxes that it is to write.

        ``loads``: shape (ledgers, ranks), what each rank writes beside that. It is changed.
        """
        sizes, boxes, tensors = self._in_order()
        self._flat_ranks = np.concatenate([_NONE, *self._ranks])
        self._flat_positions = np.concatenate([_NONE, *self._positions])
        self._widths = np.array([len(ranks) for ranks in self._ranks], dtype=np.int64)
        self._firsts = np.cumsum(self._widths) - self._widths
        sets = np.array(self._sets, dtype=np.int64)
        found = np.empty(len(boxes), dtype=np.int64)  # where the chosen rank is in the flat arrays
        of_size = sorted(self._sizes)
        # Boxes of one size in one ledger at a time: each adds the same to a load, so many can be given away at once.
        for begin, end in _runs(sizes):
            ledger, negative = of_size[sizes[begin]]
            load, run = loads[ledger], boxes[begin:end]
            for batch in self._batches(sets[run], run):
                # A batch is either of one set of ranks, or of sets without a rank in common.
                if len(batch) > 1 and sets[run[batch[0]]] == sets[run[batch[1]]]:
                    chosen = self._fewest_first(load, run[batch], -negative)
                else:
                    chosen = self._least_loaded(load, run[batch])
                found[begin + batch] = chosen
                # add.at and not +=: a rank may get several boxes of a batch, and += would add the bytes once.
                np.add.at(load, self._flat_ranks[chosen], -negative)
        yield from self._by_rank(self._flat_ranks[found], boxes, tensors, self._flat_positions[found])

    def _in_order(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """By box of each tensor, the largest first: number of its size, of the box and of the tensor."""
        lengths = [len(tensors) for tensors in self._tensors]
        order = np.argsort(np.concatenate([_NONE, *self._turns]), kind="stable")
        self._turns = []
        # Sizes are numbered as they come; ``ranked`` has each one's position by ledger and size, the largest first.
        ranked = np.empty(len(self._sizes), dtype=np.int64)
        ranked[[number for _, number in sorted(self._sizes.items())]] = np.arange(len(self._sizes))
        sizes = ranked[np.concatenate([_NONE, *self._size_of])[order]]
        by_size = _order(sizes)
        order, sizes = order[by_size], sizes[by_size]
        return sizes, np.repeat(np.arange(len(lengths)), lengths)[order], np.concatenate([_NONE, *self._tensors])[order]

    def _by_rank(
        self, writers: np.ndarray, boxes: np.ndarray, tensors: np.ndarray, positions: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        groups = np.array(self._groups, dtype=np.int64)[boxes]
        order = _order(groups)
        # Two stable sorts, by group and then by writer: what each rank writes comes in one run per group.
        order = order[_order(writers[order])]
        writers, groups = writers[order], groups[order]
        for begin, end in _runs(writers * max(1, len(self._entries)) + groups):
            rank, mine = int(writers[begin]), order[begin:end]
            yield rank, self._entries[groups[begin]](rank)[tensors[mine]], positions[mine]

    def _batches(self, sets: np.ndarray, boxes: np.ndarray) -> Iterator[np.ndarray]:
        """Yield positions of boxes of one size that can be given away at once.

        All of them are held by the same ranks, or no rank holds two of them.
        """
        begins = np.concatenate([[0], np.flatnonzero(np.diff(sets)) + 1])
        ranks = np.concatenate([self._ranks[box] for box in boxes[begins]])
        if len(np.unique(ranks)) < len(ranks):  # sets that overlap: one box after the other
            yield from np.arange(len(boxes))[:, None]
            return
        lengths = np.diff(begins, append=len(boxes))
        if lengths.max() > len(begins):  # as many batches as there are sets, or as a set has boxes
            yield from np.split(np.arange(len(boxes)), begins[1:])
            return
        turns = np.arange(len(boxes)) - np.repeat(begins, lengths)  # the how-manieth of its set
        order = _order(turns)
        yield from np.split(order, np.flatnonzero(np.diff(turns[order])) + 1)

    def _fewest_first(self, load: np.ndarray, boxes: np.ndarray, nbytes: int) -> np.ndarray:
        """As ``_least_loaded`` for one box after the other, all of them held by the same ranks.

        What a rank would have after each box that it might get is an arithmetic progression; the boxes go to the
        smallest of these numbers.
        """
        first, width = self._firsts[boxes[0]], self._widths[boxes[0]]
        own, size, count = load[self._flat_ranks[first : first + width]], max(nbytes, 1), len(boxes)
        # Binary search for the load up to which ``count`` boxes fit, instead of one step per box.
        low, high = int(own.min()), int(own.min()) + size * count
        while low < high:  # the smallest level up to which there are enough numbers
            level = (low + high) // 2
            if np.maximum((level - own) // size + 1, 0).sum() < count:
                low = level + 1
            else:
                high = level
        terms = np.maximum((low - own) // size + 1, 0)
        columns = np.repeat(np.arange(width), terms)
        steps = np.arange(len(columns)) - np.repeat(np.cumsum(terms) - terms, terms)
        # The smallest loads first, and among equal ones the first rank, as argmin takes it for one box after the other.
        chosen = columns[np.lexsort((columns, own[columns] + steps * size))[:count]]
        found: np.ndarray = self._firsts[boxes] + chosen
        return found

    def _least_loaded(self, load: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """Of the holders of each box the one with the least to do, by its place in the flat arrays."""
        firsts, widths = self._firsts[boxes], self._widths[boxes]
        found = np.empty(len(boxes), dtype=np.int64)
        for width in np.unique(widths):
            # Boxes with equally many holders are one matrix, of which argmin takes each row at once.
            alike = firsts[widths == width]
            found[widths == width] = alike + load[self._flat_ranks[alike[:, None] + np.arange(width)]].argmin(axis=1)
        return found


def _order(numbers: np.ndarray) -> np.ndarray:
    """The stable order of numbers from 0. Those of up to 16 bits are sorted in linear time."""
    if not len(numbers):
        return _NONE
    return np.argsort(numbers.astype(np.min_scalar_type(int(numbers.max()))), kind="stable")


def _runs(numbers: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each run of equal numbers."""
    edges = np.flatnonzero(np.diff(numbers)) + 1
    yield from itertools.pairwise([0, *edges.tolist(), len(numbers)] if len(numbers) else [])
