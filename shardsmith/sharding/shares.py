"""Digests of whole tensors out of the shares that ranks have taken: the one place that adds shares up."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from shardsmith.tensors.digest import Digest


@dataclass(frozen=True, slots=True)
class Totals:
    """The sums of all shares."""

    digests: dict[str, Digest]
    """Of each tensor of which a rank holds a box."""
    differing: frozenset[str]
    """Tensors of which ranks hold the same box with different values; the first rank's counts."""


def add_up_boxes(shares: Iterable[tuple[str, Hashable, str]]) -> Totals:
    """Add up the shares of boxes; a box that several ranks hold counts once. No communication.

    Args:
        shares: Name of the tensor, its box, and the box's share of the digest as text; the lowest rank's first. The
            boxes of a tensor are the same or do not overlap.
    """
    first: dict[tuple[str, Hashable], str] = {}
    # setdefault keeps the share of the lowest rank and shows at once whether a later one differs.
    differing = [name for name, box, text in shares if first.setdefault((name, box), text) != text]
    digests: dict[str, Digest] = {}
    for (name, _), text in first.items():
        digests[name] = digests.get(name, Digest()) + Digest.parse(text)
    return Totals(digests, frozenset(differing))


def add_up_ranks(parts: Sequence[Mapping[str, str]], names: Iterable[str]) -> dict[str, Digest]:
    """Add up the shares of ranks that have each looked at other elements. No communication.

    Args:
        parts: For each rank, its share in the digest of each tensor, as text. A share of nothing may be left out.
        names: The tensors.
    """
    digests = add_up_boxes((name, rank, text) for rank, part in enumerate(parts) for name, text in part.items()).digests
    return {name: digests.get(name, Digest()) for name in names}
