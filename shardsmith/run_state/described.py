"""What a rank holds, as it says it to rank 0: a description that all ranks of a kind share, and its own lists of boxes.

A thousand ranks that hold the same tensors are kept as one description. What a single rank holds is made of it when it
is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from shardsmith.run_state.held import Entry
from shardsmith.sharding.holding import Boxes, Holding, Kind, numbered
from shardsmith.tensors.checkpoint_keys import KeyPath
from shardsmith.tensors.dtypes import dtype_name
from shardsmith.tensors.tensors import Chunk

_OWN = "rank-*"
"""Stands in a description for what only this rank has: a path element ``rank-<number>``."""
NO_RANK = -1
"""Describes what is no rank's own."""
_VALUE: Boxes = (Chunk((), ()),)
"""What is no tensor counts as one box."""


def describe(entries: Sequence[Entry], rank: int) -> tuple[bytes, list[Boxes]]:
    """What a rank holds, in words that do not depend on the rank, and its lists of boxes."""
    own = f"rank-{rank}"
    numbers, lists = numbered((e.shape, _VALUE if e.shape is None else e.boxes) for e in entries)
    names = {dtype: None if dtype is None else dtype_name(dtype) for dtype in {entry.dtype for entry in entries}}
    rows = []
    for entry, number in zip(entries, numbers, strict=True):
        path = [_OWN if step == own else step for step in entry.path] if own in entry.path else entry.path
        rows.append((path, entry.shape, names[entry.dtype], number))
    return json.dumps(rows, separators=(",", ":")).encode(), lists


class Description:
    """What ranks of one kind hold, but for their boxes.

    Attributes:
        kind: Names and numbers of lists.
        entries: In order, without boxes; keys and paths of what is a rank's own are those of no rank.
    """

    def __init__(self, text: bytes) -> None:
        rows = json.loads(text)
        self.entries = [
            _entry(tuple(path), None if shape is None else tuple(shape), dtype) for path, shape, dtype, _ in rows
        ]
        own = frozenset(i for i, entry in enumerate(self.entries) if _OWN in entry.path)
        numbers = np.array([number for *_, number in rows], dtype=np.int64)
        self.kind = Kind([entry.key for entry in self.entries], numbers, own)


class RankHolds(NamedTuple):
    """What one rank holds."""

    rank: int
    description: Description
    lists: Sequence[Boxes]

    def holding(self) -> Holding:
        """Return it by names and boxes alone."""
        own = {i: self.entry(i).key for i in self.description.kind.own}
        return Holding(self.description.kind, self.lists, own)

    def entry(self, number: int) -> Entry:
        """Return an entry, without boxes."""
        entry = self.description.entries[number]
        if number not in self.description.kind.own:
            return entry
        path = tuple(f"rank-{self.rank}" if step == _OWN else step for step in entry.path)
        return entry._replace(key=_key(path), path=path)

    def entries(self) -> list[Entry]:
        """Return all entries, with their boxes."""
        found = [*self.description.entries]
        for number in self.description.kind.own:
            found[number] = self.entry(number)
        numbers = self.description.kind.numbers.tolist()
        return [e if e.shape is None else e._replace(boxes=self.lists[n]) for e, n in zip(found, numbers, strict=True)]

    def counts(self) -> np.ndarray:
        """Return how many boxes there are of each entry; of what is no tensor, one."""
        found: np.ndarray = np.array([len(boxes) for boxes in self.lists], dtype=np.int64)[
            self.description.kind.numbers
        ]
        return found


def entries_in_all(held: Iterable[RankHolds]) -> dict[str, Entry]:
    """Return by key, without boxes, what the ranks hold together, in the order in which the keys are first met."""
    found: dict[str, Entry] = {}
    seen = set[Description]()
    for one in held:
        is_new = one.description not in seen
        seen.add(one.description)
        # A description that was met before adds only what is a rank's own.
        for number in range(len(one.description.entries)) if is_new else sorted(one.description.kind.own):
            # For what is a rank's own the key has the number of the rank.
            entry = one.entry(number)
            # Of ranks that have the same key the first one decides its place.
            found.setdefault(entry.key, entry)
    return found


def _entry(path: KeyPath, shape: tuple[int, ...] | None, dtype: str | None) -> Entry:
    return Entry(_key(path), path, shape, None if dtype is None else getattr(torch, dtype), ())


def _key(path: KeyPath) -> str:
    return ".".join(map(str, path))
