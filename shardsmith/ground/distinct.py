"""An agreement on long values that are the same on most ranks: each is sent once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TypeVar

import xxhash

from shardsmith.ground.ranks import Ranks

T = TypeVar("T")
D = TypeVar("D")


def agree_on_distinct(ranks: Ranks, phase: str, body: Callable[[], T], decide: Callable[[list[T]], D]) -> D:
    """Run ``body`` on every rank, ``decide`` on rank 0 with all different values; its value on every rank.

    As ``ranks.agree``, for values that most ranks have alike: of equal ones the lowest rank sends its own, and they
    come in the order of these ranks. All ranks call it; communicates through the store, twice.

    Args:
        ranks: All ranks of the job.
        phase: What is being done, for error messages.
        body: Its value must survive JSON, and not be None. Dicts in another order count as other values.
        decide: Its value must survive JSON.

    Raises:
        RankError: as ``ranks.agree``.
    """
    own: list[T] = []  # of this rank, between the two exchanges

    def hashed() -> str:
        own.append(body())
        return xxhash.xxh3_128_hexdigest(json.dumps(own[0]).encode())

    is_first = ranks.deal(phase, hashed, _are_first)
    return ranks.agree(
        phase,
        lambda: own[0] if is_first else None,
        lambda values: decide([value for value in values if value is not None]),
        large=True,
    )


def _are_first(hashes: Sequence[str]) -> list[bool]:
    """For each rank, whether no lower one has the same."""
    first: dict[str, int] = {}
    for rank, text in enumerate(hashes):
        first.setdefault(text, rank)
    return [first[text] == rank for rank, text in enumerate(hashes)]
