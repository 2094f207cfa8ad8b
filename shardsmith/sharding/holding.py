"""Which boxes a rank holds, in a few words: a model has thousands of tensors, and few ways in which they are sharded.

So a rank has a few lists of boxes, and of each tensor the number of its list. Names and numbers are the same on many
ranks, which are of one kind. Only the lists differ from rank to rank, and they do not get longer with more tensors.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from shardsmith.tensors.tensors import Chunk

Boxes = tuple[Chunk, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Kind:
    """What ranks have in common that hold the same tensors. They share this object."""

    names: Sequence[str]
    numbers: np.ndarray
    """By name: the number of its list of boxes."""
    own: frozenset[int] = field(default_factory=frozenset)
    """Positions of names that differ from rank to rank, and are in ``Holding.own``."""


class Holding(NamedTuple):
    """What one rank holds."""

    kind: Kind
    lists: Sequence[Boxes]
    own: Mapping[int, str] = {}
    """Names that other ranks of the kind have not, by position."""


def numbered(boxes: Iterable[tuple[Hashable, Boxes]]) -> tuple[list[int], list[Boxes]]:
    """Return of each tensor the number of its list, and the lists.

    Args:
        boxes: Of each tensor its shape and the boxes that this rank holds. Only tensors of one shape have one list: so
            ranks that hold nothing of some tensors number the others as all ranks do.
    """
    # A dict numbers its entries by first appearance: setdefault evaluates len(known) before it inserts.
    known: dict[tuple[Hashable, Boxes], int] = {}
    numbers = [known.setdefault(one, len(known)) for one in boxes]
    return numbers, [own for _, own in known]


def pack_lists(lists: Sequence[Boxes]) -> str:
    """Return lists of boxes as text."""
    # Number of lists; then for each list its length and number of dimensions, and offsets and sizes of each box.
    numbers = [len(lists)]
    for boxes in lists:
        numbers += [len(boxes), len(boxes[0].sizes) if boxes else 0]
        for box in boxes:
            numbers += [*box.offsets, *box.sizes]
    return pack(np.array(numbers, dtype=np.int64).tobytes())


def unpack_lists(text: str) -> list[Boxes]:
    """Return what ``pack_lists`` packed."""
    numbers = np.frombuffer(unpack(text), dtype=np.int64).tolist()
    lists, at = [], 1
    for _ in range(numbers[0]):
        count, ndim = numbers[at : at + 2]
        begin, at = at + 2, at + 2 + 2 * ndim * count
        # A 0-dim box has no numbers, so only their count says how many there are.
        firsts = range(begin, at, 2 * ndim) if ndim else [begin] * count
        lists.append(
            tuple(
                Chunk(tuple(numbers[first : first + ndim]), tuple(numbers[first + ndim : first + 2 * ndim]))
                for first in firsts
            )
        )
    return lists


def pack(data: bytes) -> str:
    """Return bytes as text, compressed."""
    return base64.b64encode(zlib.compress(data, 1)).decode()


def unpack(text: str) -> bytes:
    """Return what ``pack`` packed."""
    return zlib.decompress(base64.b64decode(text))


def pack_flags(flags: np.ndarray) -> str:
    """Return a bool for each box as text."""
    return pack(np.packbits(flags).tobytes())


def unpack_flags(text: str, count: int) -> np.ndarray:
    """Return what ``pack_flags`` packed: ``count`` bools."""
    # packbits fills the last byte up with zeros, which ``count`` cuts off.
    return np.unpackbits(np.frombuffer(unpack(text), dtype=np.uint8), count=count).astype(bool)
