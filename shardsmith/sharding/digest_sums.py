"""Digests of whole tensors out of those of boxes, which ranks have taken: rank 0 adds them up and compares replicas.

A model has thousands of tensors, and few ways in which they are sharded. So a rank makes a list of the tensors of one
shape of which it holds the same boxes, and tells rank 0 three hashes of each list: of its names, its boxes and its
digests. Rank 0 asks one of the ranks that have all three alike for boxes and digests, and one of those with the same
names for the names. So replicas that are equal send no digests, and a name is sent once, whatever the number of ranks.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import xxhash
from torch import Tensor

from shardsmith.ground.garbage import without_collection
from shardsmith.ground.ranks import Ranks
from shardsmith.sharding.boxes import why_not_whole
from shardsmith.sharding.holding import Boxes, numbered, pack_lists, unpack_lists
from shardsmith.sharding.local_boxes import local_boxes
from shardsmith.tensors.digest import Digest, digest_box
from shardsmith.tensors.dtypes import dtype_name
from shardsmith.tensors.tensors import Chunk, Shape

D = TypeVar("D")

_HASH_BYTES = 16


class Digested(NamedTuple):
    """What one rank holds of a tensor."""

    shape: Shape
    """Global."""
    dtype: str
    boxes: Boxes
    digests: Sequence[Digest]
    """By box, its share in the digest of the tensor."""


class Spec(NamedTuple):
    """Name, global shape and dtype of a tensor, as a rank has it."""

    name: str
    shape: Shape
    dtype: str


def digest_boxes(tensor: Tensor) -> Digested:
    """Return digests of all that this rank holds of a DTensor, ShardedTensor or plain tensor. No communication."""
    shape, parts = tuple(tensor.shape), local_boxes(tensor)
    digests = [digest_box(values, box, shape) for box, values in parts]
    return Digested(shape, dtype_name(tensor.dtype), tuple(box for box, _ in parts), digests)


def sum_digests(
    ranks: Ranks, phase: str, collect: Callable[[], Mapping[str, Digested]], decide: Callable[[DigestSums], D]
) -> D:
    """Run ``collect`` on every rank, ``decide`` on rank 0 with the sums of all ranks; its value on every rank.

    All ranks call it. Communicates through the store, twice.

    Args:
        ranks: All ranks of the job.
        phase: What is being done, for error messages.
        collect: Returns what this rank holds, by name. Ranks may hold other tensors, and in another order.
        decide: Its value must survive JSON.

    Raises:
        RankFailedError: on every rank, if ``collect`` raised on any or ``decide`` on rank 0. With one rank, the
            original error.
    """
    own: list[OwnDigests] = []  # of this rank, between the two exchanges
    sums = RanksSums()

    def hashes() -> str:
        with without_collection():
            own.append(OwnDigests.of(collect(), ranks.rank))
            return own[0].hashes()

    def decided(reports: Sequence[Report]) -> D:
        with without_collection():
            return decide(sums.add_up(reports))

    wanted = ranks.deal(phase, hashes, sums.ask, large=True)
    return ranks.agree(phase, lambda: own[0].report(wanted), decided, large=True)


Wanted = tuple[list[int], list[int]]
"""What a rank is asked for: of which of its lists boxes and digests, and of which the names."""
Report = Sequence[Any]
"""Packed digests and boxes of lists, and of others shape and names."""


class NameList(NamedTuple):
    """Tensors of one shape."""

    shape: Shape
    rows: Sequence[tuple[int, str, str]]
    """Place among the rank's tensors, name, dtype."""
    hash: bytes
    """Of all but the places."""

    @classmethod
    def of(cls, shape: Shape, rows: Sequence[tuple[int, str, str]]) -> NameList:
        """Return it with its hash."""
        return cls(shape, rows, _hash(json.dumps([shape, [row[1:] for row in rows]]).encode()))


class TensorList(NamedTuple):
    """Tensors of one shape of which a rank holds the same boxes."""

    names: NameList
    boxes: Boxes
    digests: np.ndarray
    """uint64, by box and name both sums of a digest."""


@dataclass(frozen=True, slots=True)
class OwnDigests:
    """What a rank holds and has digested."""

    lists: Sequence[TensorList]

    @classmethod
    def of(cls, held: Mapping[str, Digested], rank: int) -> OwnDigests:
        """Return it as lists. No communication."""
        own = f"rank-{rank}"
        # What only this rank has, by its name, gets lists of its own, so that the others are equal on all ranks.
        numbers, lists = numbered(((one.shape, own in name.split(".")), one.boxes) for name, one in held.items())
        rows: list[list[tuple[int, str, str]]] = [[] for _ in lists]
        digests: list[list[tuple[int, int]]] = [[] for _ in lists]
        shapes = dict(zip(numbers, (one.shape for one in held.values()), strict=True))
        for place, (number, (name, one)) in enumerate(zip(numbers, held.items(), strict=True)):
            rows[number].append((place, name, one.dtype))
            digests[number] += [(digest.total, digest.weighted) for digest in one.digests]
        return cls(
            [
                TensorList(
                    NameList.of(shapes[number], rows[number]),
                    boxes,
                    np.array(digests[number], np.uint64).reshape(len(rows[number]), len(boxes), 2).swapaxes(0, 1),
                )
                for number, boxes in enumerate(lists)
            ]
        )

    def hashes(self) -> str:
        """Return the hashes of all lists: what ``RanksSums.ask`` takes."""
        found = ((one.names.hash, _hash(repr(one.boxes).encode()), _hash(one.digests.tobytes())) for one in self.lists)
        return base64.b64encode(b"".join(itertools.chain(*found))).decode()

    def report(self, wanted: Wanted) -> Report:
        """Return what rank 0 asks for: what ``RanksSums.add_up`` takes."""
        told, named = ([self.lists[number] for number in numbers] for numbers in wanted)
        return [
            base64.b64encode(b"".join(one.digests.tobytes() for one in told)).decode(),
            pack_lists([one.boxes for one in told]),
            [[one.names.shape, one.names.rows] for one in named],
        ]


class RanksSums:
    """Rank 0: first it asks the ranks, then it adds up what they have reported."""

    def __init__(self) -> None:
        self._names_told: list[list[int]] = []  # by rank, of each list that it is to tell the number of its names

    def ask(self, said: Sequence[str]) -> list[Wanted]:
        """Return what each rank is asked for, by what ``OwnDigests.hashes`` gave there."""
        known = set[bytes]()
        numbers: dict[bytes, int] = {}  # of name lists, in the order in which they are asked for
        answers = []
        for text in said:
            told, named = [], []
            self._names_told.append([])
            for place, hashes in enumerate(_split(base64.b64decode(text), 3 * _HASH_BYTES)):
                names = hashes[:_HASH_BYTES]
                if names not in numbers:
                    numbers[names] = len(numbers)
                    named.append(place)
                # Of replicas that differ each kind of them is told.
                if hashes not in known:
                    known.add(hashes)
                    told.append(place)
                    self._names_told[-1].append(numbers[names])
            answers.append((told, named))
        return answers

    def add_up(self, reports: Sequence[Report]) -> DigestSums:
        """Return the sums, by what ``OwnDigests.report`` gave on each rank."""
        specs, in_order = _specs(reports)
        groups = _groups(specs)
        in_list: list[list[tuple[_Group, slice | np.ndarray]]] = [[] for _ in specs]
        for group in groups:
            for number, places in group.places.items():
                in_list[number].append((group, places))
        told = [
            [*zip(numbers, unpack_lists(boxes), strict=True)]
            for numbers, (_, boxes, _) in zip(self._names_told, reports, strict=True)
        ]
        for number, boxes in itertools.chain(*told):
            for group, _ in in_list[number]:
                group.times.update(boxes)
        for (text, *_), lists in zip(reports, told, strict=True):
            digests, begin = np.frombuffer(base64.b64decode(text), np.uint64).reshape(-1, 2), 0
            for number, boxes in lists:
                for box in boxes:
                    end = begin + len(specs[number])
                    for group, places in in_list[number]:
                        group.add(box, digests[begin:end][places])
                    begin = end
        return DigestSums(in_order, groups)


class DigestSums:
    """What all ranks hold together; on rank 0.

    Attributes:
        specs: Of each tensor once, or as often as ranks have it in another shape or dtype. The lowest rank's first.
        digests: By name, of whole tensors. Of replicas that differ the lowest rank's counts.
        differing: Names of tensors of which ranks hold the same box with different values.
    """

    def __init__(self, specs: Sequence[Spec], groups: Sequence[_Group]) -> None:
        self.specs = specs
        self.digests = {
            name: Digest(*row) for group in groups for name, row in zip(group.names, group.sums.tolist(), strict=True)
        }
        self.differing = frozenset(itertools.chain(*(itertools.compress(g.names, g.differing) for g in groups)))
        self._groups = groups

    def not_whole(self) -> dict[str, str]:
        """Return by name what is wrong where the boxes of all ranks overlap or leave holes."""
        problems = ((group, group.problem()) for group in self._groups)
        return {name: problem for group, problem in problems if problem for name in group.names}


class _Group:
    """Tensors that are in the same lists of names: all that is said of one of them is said of all.

    Attributes:
        places: By number of a list of names, where in it they are.
        times: By box, how often it was told. Of those that several ranks have told one counts.
        sums: uint64, both sums of the digest by name.
        differing: By name, whether ranks hold the same box with different values.
    """

    def __init__(self, names: list[str], lists: Mapping[int, Sequence[Spec]]) -> None:
        self.names = names
        self._shapes = [*dict.fromkeys(specs[0].shape for specs in lists.values())]
        self.places = {number: _places(names, specs) for number, specs in lists.items()}
        self.times = Counter[Chunk]()
        self.sums = np.zeros((len(names), 2), np.uint64)
        self.differing = np.zeros(len(names), bool)
        self._first: dict[Chunk, np.ndarray] = {}

    def add(self, box: Chunk, digests: np.ndarray) -> None:
        """Add the digests of one rank's box, by name, mod 2**64."""
        if self.times[box] > 1:
            first = self._first.setdefault(box, digests)
            if first is not digests:
                self.differing |= (first != digests).any(axis=1)
                return
        self.sums += digests

    def problem(self) -> str | None:
        """What is wrong if the ranks' boxes are not together a tensor."""
        if len(self._shapes) > 1:
            return f"ranks hold tensors of shape {' and '.join(map(str, self._shapes))} under this name"
        return why_not_whole([*self.times], self._shapes[0])


def _specs(reports: Sequence[Report]) -> tuple[list[list[Spec]], list[Spec]]:
    """All lists of names, and each tensor once, in the order of the lowest rank that has it."""
    lists: list[list[Spec]] = []
    in_order: dict[Spec, None] = {}
    for _, _, named in reports:
        found: list[tuple[int, Spec]] = []
        for shape, rows in named:
            placed = [(place, Spec(name, tuple(shape), dtype)) for place, name, dtype in rows]
            lists.append([spec for _, spec in placed])
            found += placed
        in_order |= dict.fromkeys(spec for _, spec in sorted(found))
    return lists, [*in_order]


def _groups(lists: Sequence[Sequence[Spec]]) -> list[_Group]:
    where: dict[str, list[int]] = {}
    for number, specs in enumerate(lists):
        for spec in specs:
            where.setdefault(spec.name, []).append(number)
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, numbers in where.items():
        alike.setdefault(tuple(numbers), []).append(name)
    return [_Group(names, {number: lists[number] for number in numbers}) for numbers, names in alike.items()]


def _places(names: Sequence[str], specs: Sequence[Spec]) -> slice | np.ndarray:
    if len(names) == len(specs) and all(name == spec.name for name, spec in zip(names, specs, strict=True)):
        return slice(None)  # the usual case, in which nothing is copied
    places = {spec.name: place for place, spec in enumerate(specs)}
    return np.array([places[name] for name in names])


def _split(data: bytes, length: int) -> Iterator[bytes]:
    return (data[at : at + length] for at in range(0, len(data), length))


def _hash(data: bytes) -> bytes:
    return xxhash.xxh3_128_digest(data)
