"""Who writes what: agreed once, and used again as long as every rank holds what it held then.

Of all ranks that hold a box, or a value that is no tensor, one writes it. A rank says what it holds as a description,
which all ranks of a kind share, so that one of them sends it, and as the boxes that are its own.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash

from shardsmith.errors import RanksDisagreeError
from shardsmith.run_state.held import Entry, items
from shardsmith.run_state.weight_files import Placed
from shardsmith.run_state.whole_directory import NOWHERE, OwnFile, WholeDirectory
from shardsmith.sharding.assignment import assign_boxes
from shardsmith.tensors.dtypes import dtype_name
from shardsmith.tensors.tensors import Chunk

_OWN = "rank-*"
"""Stands in a description for what only this rank has: a path element ``rank-<number>``."""


class Share:
    """What this rank writes, kept from save to save; on rank 0 also what every rank writes.

    Attributes:
        own: What this rank writes.
        whole: Rank 0 only: what all ranks write together.
    """

    own: OwnFile
    whole: WholeDirectory

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._entries: list[Entry] | None = None
        self._placed = NOWHERE
        self._description = ""

    def vote(self, entries: list[Entry], placed: Placed = NOWHERE) -> list[Any]:
        """Return what to say before a save. No communication. ``placed`` is what goes to weight files."""
        is_known = entries == self._entries and placed == self._placed
        if not is_known:
            # Forgotten at once: if this save fails, the next one must not take a share that was never agreed.
            self._entries, self._placed = None, placed
            self._description = _hash(_describe(entries, self._rank))
        return [is_known, self._description]

    def report(self, entries: list[Entry], speakers: Sequence[int]) -> list[Any]:
        """What to say if anybody does not know its share: the description, if this rank is a speaker; the boxes."""
        text = _packed(_describe(entries, self._rank)) if self._rank in speakers else None
        return [self._description, text, _pack_boxes(entries)]

    def settle(self, reports: Sequence[Sequence[Any]], problems: Sequence[str]) -> list[str]:
        """Rank 0: deal out what all ranks together hold; for each rank what ``accept`` takes.

        Args:
            reports: For each rank what it holds.
            problems: Lines on what is wrong already.

        Raises:
            RanksDisagreeError: they hold different things under one key, or not whole tensors; naming all of them.
        """
        descriptions = {name: json.loads(_unpacked(text)) for name, text, _ in reports if text is not None}
        # Boxes differ on every rank, descriptions hardly ever: each is parsed once, however many ranks have it.
        held = [_entries(descriptions[name], boxes, rank) for rank, (name, _, boxes) in enumerate(reports)]
        speakers = [rank for rank, (_, text, _) in enumerate(reports) if text is not None]
        # Ranks with one description cannot differ, so the speakers stand for all.
        _refuse([*problems, *_differences({rank: held[rank] for rank in speakers})])
        dealt = _deal(held)
        self.whole = WholeDirectory(
            held,
            [
                [item for item, is_mine in zip(items(entries), flags, strict=True) if is_mine]
                for entries, flags in zip(held, dealt, strict=True)
            ],
            self._placed,
        )
        return [_text(np.packbits(np.array(flags, dtype=bool)).tobytes()) for flags in dealt]

    def accept(self, entries: list[Entry], answer: str) -> None:
        """Take this rank's part of what ``settle`` gave."""
        flags = np.unpackbits(np.frombuffer(base64.b64decode(answer), dtype=np.uint8))
        chosen = [item for item, is_mine in zip(items(entries), flags, strict=False) if is_mine]
        self.own = OwnFile.of(self._rank, entries, chosen, self._placed)
        self._entries = entries


def speakers_of(votes: Sequence[Sequence[Any]]) -> list[int]:
    """Of each description the lowest rank that has it."""
    first: dict[str, int] = {}
    for rank, (_, description) in enumerate(votes):
        first.setdefault(description, rank)
    return sorted(first.values())


def _describe(entries: Sequence[Entry], rank: int) -> bytes:
    """What a rank holds but for its boxes, in words that do not depend on the rank."""
    own = f"rank-{rank}"
    rows = []
    for entry in entries:
        path = [_OWN if step == own else step for step in entry.path]
        dtype = None if entry.dtype is None else dtype_name(entry.dtype)
        rows.append([path, entry.shape, dtype])
    return json.dumps(rows, separators=(",", ":")).encode()


def _entries(rows: Sequence[Any], boxes: str, rank: int) -> list[Entry]:
    """The inverse of ``_describe``, decoded once for all ranks of a kind, and ``_pack_boxes``."""
    entries = []
    numbers = np.frombuffer(_unpacked(boxes), dtype=np.int64).tolist()
    counts, at = numbers[: len(rows)], len(rows)
    for (steps, shape, dtype), count in zip(rows, counts, strict=True):
        path = tuple(f"rank-{rank}" if step == _OWN else step for step in steps)
        found, ndim = [], len(shape or ())
        for _ in range(count):
            found.append(Chunk(tuple(numbers[at : at + ndim]), tuple(numbers[at + ndim : at + 2 * ndim])))
            at += 2 * ndim
        place = None if shape is None else tuple(shape)
        entries.append(Entry(".".join(map(str, path)), path, place, dtype and getattr(torch, dtype), tuple(found)))
    return entries


def _pack_boxes(entries: Sequence[Entry]) -> str:
    numbers = [len(entry.boxes) for entry in entries]
    for entry in entries:
        for box in entry.boxes:
            numbers += [*box.offsets, *box.sizes]
    return _packed(np.array(numbers, dtype=np.int64).tobytes())


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


def _deal(held: Sequence[Sequence[Entry]]) -> list[list[bool]]:
    """For each rank, which of its ``items`` it writes: each thing is written by one, and the bytes are spread."""
    shapes = {entry.key: entry.shape for entries in held for entry in entries if entry.shape and 0 not in entry.shape}
    shapes |= {entry.key: () for entries in held for entry in entries if entry.shape == ()}  # () is falsy above
    sizes = {entry.key: entry.dtype.itemsize for entries in held for entry in entries if entry.dtype is not None}
    boxes = [[(e.key, box) for e in entries if e.key in shapes for box in e.boxes] for entries in held]
    dealt = [frozenset(chosen) for chosen in assign_boxes(boxes, shapes, sizes)]
    writers = _writers({entry.key for entries in held for entry in entries} - shapes.keys(), held)
    return [
        [
            (e.key, e.boxes[position]) in dealt[rank] if e.key in shapes else writers[e.key] == rank
            for i, position in items(entries)
            for e in (entries[i],)
        ]
        for rank, entries in enumerate(held)
    ]


def _writers(keys: set[str], held: Sequence[Sequence[Entry]]) -> dict[str, int]:
    """By key of what has no elements, the rank that writes it: of those that have it the one with the least to do."""
    holders: dict[str, list[int]] = {}
    for rank, entries in enumerate(held):
        for entry in entries:
            if entry.key in keys:
                holders.setdefault(entry.key, []).append(rank)
    count = [0] * len(held)
    writers = {}
    for key, ranks in holders.items():
        writers[key] = min(ranks, key=count.__getitem__)
        count[writers[key]] += 1
    return writers


def _hash(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _packed(data: bytes) -> str:
    return _text(zlib.compress(data, 1))


def _unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
