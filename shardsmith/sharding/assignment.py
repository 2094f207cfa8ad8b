"""Who writes what: of all ranks that hold a box one is chosen, and every tensor is verified to be covered.

Nothing is assumed about the sharding: the ranks say which boxes they hold, so that replicas of any kind (DDP, HSDP,
tensor parallel ``Replicate``, FSDP1's hybrid shards) and pipeline stages are all the same case. Tensors that all ranks
hold alike are one group, looked at once, however many they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from shardsmith.errors import RanksDisagreeError
from shardsmith.sharding.boxes import why_not_whole
from shardsmith.sharding.holding import Boxes, Holding, Kind, numbered
from shardsmith.sharding.replicas import SharedBoxes
from shardsmith.tensors.tensors import Chunk, Shape

Held = tuple[str, Chunk]
"""Name of a tensor and a box of it that a rank holds."""


def assign_boxes(
    held: Sequence[Sequence[Held]], shapes: Mapping[str, Shape], itemsizes: Mapping[str, int]
) -> list[list[Held]]:
    """For each rank the boxes that it is to write, so that every element is written once and the bytes are spread.

    Args:
        held: For each rank what it holds. Empty boxes are left out.
        shapes: Global shape of each tensor.
        itemsizes: Bytes of an element of each tensor, as it will be written.

    Raises:
        RanksDisagreeError: boxes overlap without being the same, or leave holes. Names every tensor at fault.
    """
    holdings, known = [], dict[tuple[tuple[str, ...], tuple[int, ...]], Kind]()
    for boxes in held:
        of_tensor: dict[str, Boxes] = {}
        for name, box in boxes:
            of_tensor[name] = (*of_tensor.get(name, ()), box)
        numbers, lists = numbered((shapes[name], own) for name, own in of_tensor.items())
        # Ranks that hold the same tensors share one Kind object: groups are made by kind, not by rank.
        kind = known.setdefault((tuple(of_tensor), tuple(numbers)), Kind([*of_tensor], np.array(numbers, dtype=int)))
        holdings.append(Holding(kind, lists))
    order = {name: i for i, name in enumerate(shapes)}
    chosen = (
        itertools.compress(_boxes_of(holding), flags)
        for holding, flags in zip(holdings, deal(holdings, shapes, itemsizes), strict=True)
    )
    return [sorted(boxes, key=lambda box: (order[box[0]], box[1].offsets)) for boxes in chosen]


def deal(
    holdings: Sequence[Holding], shapes: Mapping[str, Shape], itemsizes: Mapping[str, int | None]
) -> list[np.ndarray]:
    """For each rank a bool for each of its boxes, in the order of names and lists: whether it is to write it.

    Every element is written once. Of the ranks that hold a box, the one with the fewest bytes so far gets it: boxes
    that one rank alone holds first, then the largest.

    Args:
        holdings: What each rank holds.
        shapes: Global shape of each tensor.
        itemsizes: Bytes of an element of each tensor, as it will be written. None for what is counted, not weighed, in
            its order: of that each rank gets about as many as the others.

    Raises:
        RanksDisagreeError: as ``assign_boxes``.
    """
    groups = _groups(holdings, shapes, itemsizes)
    _check_coverage(groups, shapes)
    # Two ledgers: bytes of tensors, and the number of things that are only counted.
    loads = np.zeros((2, len(holdings)), dtype=np.int64)
    alone: dict[tuple[int, int], np.ndarray] = {}
    shared = SharedBoxes()
    for number, group in enumerate(groups):
        for rank, count in group.counts.items():
            alone[rank, number] = np.zeros(count, dtype=bool)
        in_all = sum(group.itemsizes)
        replicated = []
        for box, holders in group.holders.items():
            # A box of one rank has no choice, so its bytes are known before any replica is dealt out.
            if len(holders) > 1 or group.is_counted:
                replicated.append((1 if group.is_counted else box.numel, holders))
            else:
                ((rank, position),) = holders
                loads[0, rank] += box.numel * in_all
                alone[rank, number][position] = True
        if replicated:
            shared.add(int(group.is_counted), replicated, group.itemsizes, group.entries)
    layout = _Layout(groups)
    # The flags of boxes that one rank holds are set here; those of shared boxes follow in the order of ``choose``.
    starts, flags = zip(*(layout.flags(rank, one, alone) for rank, one in enumerate(holdings)), strict=True)
    for rank, entries, positions in shared.choose(loads):
        flags[rank][starts[rank][entries] + positions] = True
    return [*flags]


@dataclass(slots=True)
class _Group:
    """Tensors of one shape of which every rank that holds one of them holds the same boxes of each."""

    shape: Shape
    is_counted: bool
    """Not weighed."""
    names: list[str] = field(default_factory=list)
    itemsizes: list[int] = field(default_factory=list)
    places: dict[tuple[Kind, int], list[int]] = field(default_factory=dict)
    """By kind and rank, or -1 for all ranks of the kind: the positions of the names there."""
    arrays: dict[tuple[Kind, int], np.ndarray] = field(default_factory=dict)
    """The same, as far as ``entries`` was asked for it."""
    kinds: dict[int, tuple[Kind, int]] = field(default_factory=dict)
    """By rank that holds them, the key in ``places``."""
    counts: dict[int, int] = field(default_factory=dict)
    """How many boxes of each tensor a rank holds."""
    holders: dict[Chunk, list[tuple[int, int]]] = field(default_factory=dict)
    """By box: the ranks that hold it, and its position in their lists."""

    def entries(self, rank: int) -> np.ndarray:
        """Return the positions of the names in what a rank holds."""
        key = self.kinds[rank]
        if key not in self.arrays:
            self.arrays[key] = np.array(self.places[key], dtype=np.int64)
        return self.arrays[key]


def _groups(
    holdings: Sequence[Holding], shapes: Mapping[str, Shape], itemsizes: Mapping[str, int | None]
) -> list[_Group]:
    # What ranks of a kind hold alike is entered once for all of them (-1); only names of their own are entered by rank.
    ranks_of: dict[Kind, list[int]] = {}
    for rank, holding in enumerate(holdings):
        ranks_of.setdefault(holding.kind, []).append(rank)
    where: dict[str, list[tuple[Kind, int, int, int]]] = {}
    for kind, ranks in ranks_of.items():
        numbers = kind.numbers.tolist()
        for i, (name, number) in enumerate(zip(kind.names, numbers, strict=True)):
            if i not in kind.own:
                where.setdefault(name, []).append((kind, -1, number, i))
        for rank in ranks if kind.own else ():
            for i, name in holdings[rank].own.items():
                where.setdefault(name, []).append((kind, rank, numbers[i], i))
    groups: dict[tuple[object, ...], _Group] = {}
    for name, found in where.items():
        itemsize = itemsizes[name]
        # Equal keys: the same shape, held by the same ranks in the same lists. One look at the boxes does for all.
        key = (shapes[name], itemsize is None, *(one[:3] for one in found))
        group = groups.get(key)
        if group is None:
            group = groups[key] = _Group(shapes[name], itemsize is None)
            _add_holders(group, found, ranks_of, holdings)
        group.names.append(name)
        group.itemsizes.append(1 if itemsize is None else itemsize)
        for kind, rank, _, i in found:
            group.places.setdefault((kind, rank), []).append(i)
    return [*groups.values()]


def _add_holders(
    group: _Group,
    found: Sequence[tuple[Kind, int, int, int]],
    ranks_of: Mapping[Kind, list[int]],
    holdings: Sequence[Holding],
) -> None:
    members = (
        (one, number, kind, rank) for kind, rank, number, _ in found for one in (ranks_of[kind] if rank < 0 else [rank])
    )
    # By rank: all ranks compute the same order of holders, and with it the same deal.
    for one, number, kind, rank in sorted(members, key=lambda member: member[0]):
        boxes = holdings[one].lists[number]
        group.kinds[one], group.counts[one] = (kind, rank), len(boxes)
        for position, box in enumerate(boxes):
            group.holders.setdefault(box, []).append((one, position))


class _Layout:
    """Where the boxes of each tensor lie among all boxes of a rank. Worked out once for all ranks of a kind."""

    def __init__(self, groups: Sequence[_Group]) -> None:
        self._groups: dict[Kind, dict[int, tuple[int, list[int]]]] = {}
        self._own: dict[int, list[tuple[int, list[int]]]] = {}
        self._slots: dict[Kind, tuple[list[int], np.ndarray]] = {}
        self._picked: dict[tuple[bytes, bytes], tuple[np.ndarray, np.ndarray]] = {}
        for number, group in enumerate(groups):
            for (kind, rank), entries in group.places.items():
                if rank < 0:
                    self._groups.setdefault(kind, {})[number] = (number, entries)
                else:
                    self._own.setdefault(rank, []).append((number, entries))

    def flags(
        self, rank: int, holding: Holding, alone: Mapping[tuple[int, int], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where the boxes of each tensor begin, and for each box whether this rank alone holds it.

        ``alone`` has that by rank and group.
        """
        numbers, slots = self._slots_of(holding.kind)
        # A copy: the arrays of the kind are shared by its other ranks.
        if rank in self._own:
            numbers, slots = [*numbers], slots.copy()
            for number, entries in self._own[rank]:
                slots[entries] = len(numbers)
                numbers.append(number)
        parts = [alone[rank, number] for number in numbers]
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        key = slots.tobytes(), lengths.tobytes()
        if key not in self._picked:  # as large as a rank has boxes, and the same for most ranks
            # Exclusive sums: where each part begins in their concatenation, and each tensor in the flags of the rank.
            firsts, counts = np.cumsum(lengths) - lengths, lengths[slots]
            starts = np.cumsum(counts) - counts
            # For each flag its place in that concatenation: the begin of its part, and the position within the tensor.
            self._picked[key] = starts, np.repeat(firsts[slots] - starts, counts) + np.arange(counts.sum())
        starts, picked = self._picked[key]
        return starts, np.concatenate([np.zeros(0, dtype=bool), *parts])[picked]

    def _slots_of(self, kind: Kind) -> tuple[list[int], np.ndarray]:
        """Numbers of the groups of a kind, and for each name which of these it is in."""
        if kind not in self._slots:
            slots = np.zeros(len(kind.names), dtype=np.int64)
            found = [*self._groups.get(kind, {}).values()]
            for slot, (_, entries) in enumerate(found):
                slots[entries] = slot
            self._slots[kind] = [number for number, _ in found], slots
        return self._slots[kind]


def _check_coverage(groups: Sequence[_Group], shapes: Mapping[str, Shape]) -> None:
    problems: dict[str, str] = {}
    seen = set[str]()
    for group in groups:
        seen.update(group.names)
        if problem := why_not_whole([*group.holders], group.shape):
            problems |= dict.fromkeys(group.names, problem)
    problems |= {
        name: problem for name, shape in shapes.items() if name not in seen and (problem := why_not_whole([], shape))
    }
    if problems:
        lines = (f"{name}: {problems[name]}" for name in shapes if name in problems)
        raise RanksDisagreeError("\n  ".join(["the ranks do not hold whole tensors; nothing was written", *lines]))


def _boxes_of(holding: Holding) -> Iterator[Held]:
    for name, number in zip(holding.kind.names, holding.kind.numbers.tolist(), strict=True):
        yield from ((name, box) for box in holding.lists[number])
