"""Who writes what: agreed once, and used again as long as every rank holds what it held then.

Of all ranks that hold a box, or a value that is no tensor, one writes it. A rank says what it holds as a description,
which all ranks of a kind share, so that one of them sends it, and as lists of boxes that are its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import xxhash

from shardsmith.errors import RanksDisagreeError
from shardsmith.run_state.described import Description, RankHolds, describe, entries_in_all
from shardsmith.run_state.held import Entry, KnownEntries, items
from shardsmith.run_state.weight_files import Placed
from shardsmith.run_state.weights_write import HostPart
from shardsmith.run_state.whole_directory import NOWHERE, OwnFile, WholeDirectory
from shardsmith.sharding.assignment import deal
from shardsmith.sharding.holding import Boxes, pack, pack_flags, pack_lists, unpack, unpack_flags, unpack_lists
from shardsmith.tensors.dtypes import dtype_name


class Share:
    """What this rank writes, kept from save to save; on rank 0 also what every rank writes.

    Attributes:
        known: What this rank holds of a state, which it finds faster from the second save on.
        own: What this rank writes.
        host: What it does for its host in that; None until all ranks know.
        whole: Rank 0 only: what all ranks write together.
    """

    own: OwnFile
    host: HostPart | None
    whole: WholeDirectory

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self.known = KnownEntries()
        self.host = None
        self._entries: list[Entry] | None = None
        self._placed = NOWHERE
        self._description = ""
        self._described: tuple[bytes, list[Boxes]] | None = None  # between a vote and the report that follows it

    def vote(self, entries: list[Entry], placed: Placed = NOWHERE) -> tuple[bool, str]:
        """Return what to say before a save: whether this rank knows its share, and a hash of what it holds.

        No communication. ``placed`` is what goes to weight files.
        """
        is_known = entries == self._entries and placed == self._placed
        if not is_known:
            # Forgotten at once: if this save fails, the next one must not take a share that was never agreed.
            self._entries, self._placed = None, placed
            self._described = describe(entries, self._rank)
            self._description = _hash(self._described[0])
        return is_known, self._description

    def report(self, entries: list[Entry], speakers: Sequence[int]) -> list[Any]:
        """What to say if anybody does not know its share: the description, if this rank is a speaker; the boxes."""
        text, lists = self._described or describe(entries, self._rank)
        self._described = None
        return [self._description, pack(text) if self._rank in speakers else None, pack_lists(lists)]

    def settle(self, reports: Sequence[Sequence[Any]], problems: Sequence[str]) -> list[str]:
        """Rank 0: deal out what all ranks together hold; for each rank what ``accept`` takes.

        Args:
            reports: For each rank what it holds.
            problems: Lines on what is wrong already.

        Raises:
            RanksDisagreeError: they hold different things under one key, or not whole tensors; naming all of them.
        """
        descriptions = {name: Description(unpack(text)) for name, text, _ in reports if text is not None}
        held = [
            RankHolds(rank, descriptions[name], unpack_lists(boxes)) for rank, (name, _, boxes) in enumerate(reports)
        ]
        speakers = [rank for rank, (_, text, _) in enumerate(reports) if text is not None]
        # Ranks with one description cannot differ, so the speakers stand for all.
        _refuse([*problems, *_differences({rank: held[rank].entries() for rank in speakers})])
        entries = entries_in_all(held)
        shapes = {key: () if entry.shape is None else entry.shape for key, entry in entries.items()}
        sizes = {key: _itemsize(entry) for key, entry in entries.items()}
        dealt = [pack_flags(flags) for flags in deal([one.holding() for one in held], shapes, sizes)]
        self.whole = WholeDirectory(held, dealt, self._placed)
        return dealt

    def accept(self, entries: list[Entry], answer: str) -> None:
        """Take this rank's part of what ``settle`` gave."""
        found = [*items(entries)]
        chosen = [*itertools.compress(found, unpack_flags(answer, len(found)))]
        self.own, self.host = OwnFile.of(self._rank, entries, chosen, self._placed), None
        # From now on `vote` says that this rank knows its share.
        self._entries = entries


def speakers_of(votes: Sequence[Sequence[Any]]) -> list[int]:
    """Of each description the lowest rank that has it."""
    first: dict[str, int] = {}
    for rank, (_, description) in enumerate(votes):
        first.setdefault(description, rank)
    return sorted(first.values())


def _differences(held: Mapping[int, Sequence[Entry]]) -> Iterator[str]:
    """What two ranks have under one key and not in one shape and dtype."""
    seen: dict[str, tuple[int, Any]] = {}
    for rank, entries in held.items():
        for entry in entries:
            first, expected = seen.setdefault(entry.key, (rank, _spec(entry)))
            if expected != (found := _spec(entry)):
                yield f"{entry.key}: rank {first} {expected}, rank {rank} {found}"


def _spec(entry: Entry) -> Any:
    if entry.shape is None or entry.dtype is None:
        return "no tensor"
    return list(entry.shape), dtype_name(entry.dtype)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise RanksDisagreeError(
            "\n  ".join(["the ranks are about to save different things; nothing was written", *problems])
        )


def _itemsize(entry: Entry) -> int | None:
    """Bytes of an element; None for what has none, of which ranks write about equally many."""
    return None if entry.shape is None or entry.dtype is None or 0 in entry.shape else entry.dtype.itemsize


def _hash(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)
