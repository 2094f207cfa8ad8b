"""Digests of whole tensors out of the shares of ranks that have each looked at other elements."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from shardsmith.tensors.digest import Digest


def add_up_ranks(parts: Sequence[Mapping[str, str]], names: Iterable[str]) -> dict[str, Digest]:
    """Add up the shares of ranks that have each looked at other elements. No communication.

    Args:
        parts: For each rank, its share in the digest of each tensor, as text. A share of nothing may be left out.
        names: The tensors.
    """
    digests: dict[str, Digest] = {}
    for name, text in itertools.chain(*(part.items() for part in parts)):
        digests[name] = digests.get(name, Digest()) + Digest.parse(text)
    return {name: digests.get(name, Digest()) for name in names}
