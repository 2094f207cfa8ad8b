"""Who writes which box of live weights: what a rank says of its boxes, and what rank 0 makes of that.

All ranks know the names of the files' tensors, so a rank says of each only the number of its list of boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, compress

import numpy as np

from shardsmith.errors import RanksDisagreeError
from shardsmith.sharding.assignment import deal
from shardsmith.sharding.holding import (
    Holding,
    Kind,
    numbered,
    pack,
    pack_flags,
    pack_lists,
    unpack,
    unpack_flags,
    unpack_lists,
)
from shardsmith.sharding.live_boxes import LiveBox
from shardsmith.tensors.tensors import Shape

_SHOWN = 20
"""So many differences are named in an error."""


class OwnBoxes:
    """The boxes that this rank holds of tensors which all ranks name in one order.

    Attributes:
        said: What to tell rank 0; fit for JSON.
    """

    said: list[str]

    def __init__(self, shapes: Mapping[str, Shape], held: Sequence[LiveBox]) -> None:
        """``shapes``: of the tensors that the boxes are of, in the order of all ranks."""
        # In the order that all ranks share, so that a number says which tensor is meant.
        where: dict[str, list[int]] = {name: [] for name in shapes}
        for i, box in enumerate(held):
            where[box.name].append(i)
        # Positions in ``held``, in that order: the answer's flags are in it, too.
        self._order = [*chain.from_iterable(where.values())]
        numbers, lists = numbered(
            (shapes[name], tuple(held[i].box for i in positions)) for name, positions in where.items()
        )
        # int32: numbers of lists, of which there are fewer than tensors.
        self.said = [pack(np.array(numbers, dtype=np.int32).tobytes()), pack_lists(lists)]

    def chosen(self, answer: str) -> list[int]:
        """Return the positions of what this rank is to write, by what ``deal_boxes`` gave for it."""
        return [*compress(self._order, unpack_flags(answer, len(self._order)))]


def deal_boxes(
    shapes: Mapping[str, Shape], itemsizes: Mapping[str, int], reports: Sequence[Sequence[str]]
) -> list[str]:
    """On rank 0: an answer for each rank, from what all ranks said.

    Raises:
        RanksDisagreeError: they do not hold whole tensors together.
    """
    # Ranks often hold the same: what is common to them is decoded once.
    texts = {text for text, _ in reports}
    kinds = {text: Kind([*shapes], np.frombuffer(unpack(text), dtype=np.int32)) for text in texts}
    holdings = [Holding(kinds[text], unpack_lists(lists)) for text, lists in reports]
    return [pack_flags(flags) for flags in deal(holdings, shapes, itemsizes)]


def refuse_differences(said: Sequence[Sequence[Sequence[str]]]) -> None:
    """On rank 0: raise RanksDisagreeError, naming what is not the same on all ranks.

    ``said``: of each rank, pairs of a name and what it is.
    """
    different = [rank for rank, one in enumerate(said) if one != said[0]]
    lines = [line for rank in different for line in _differences(said[0], said[rank], rank)]
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    shown = "\n  ".join([*lines[:_SHOWN], *more])
    raise RanksDisagreeError(
        f"ranks {', '.join(map(str, different))} are about to export other names, shapes, dtypes or files than rank 0"
        f"\n  {shown}\nNothing was written. All ranks must hold the same model and call the hooks at the same steps."
    )


def _differences(one: Sequence[Sequence[str]], another: Sequence[Sequence[str]], rank: int) -> list[str]:
    first, other = ({entry[0]: entry[1] for entry in said} for said in (one, another))
    return [
        f"{name}: {first.get(name, 'not there')} on rank 0, {other.get(name, 'not there')} on rank {rank}"
        for name in {**first, **other}
        if first.get(name) != other.get(name)
    ] or [f"the same in another order on rank {rank}"]
