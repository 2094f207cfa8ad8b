"""Digests of whole tensors out of the shares of ranks that have each looked at other elements."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from shardsmith.sharding.holding import pack_flags, unpack_flags
from shardsmith.tensors.digest import Digest


def pack_shares(shares: Mapping[str, Digest], names: Sequence[str]) -> str:
    """Return this rank's shares in the digests of tensors as text, for ``add_up_shares``. No communication.

    Args:
        shares: By name; what this rank has seen nothing of may be left out.
        names: All tensors, the same in the same order on all ranks.
    """
    found = [shares.get(name, Digest()) for name in names]
    seen = [(share.total, share.weighted) for share in found if share != Digest()]
    flags = pack_flags(np.array([share != Digest() for share in found], bool))
    return f"{flags} {base64.b64encode(np.array(seen, np.uint64).tobytes()).decode()}"


def add_up_shares(parts: Iterable[str], names: Sequence[str]) -> dict[str, Digest]:
    """Return the digest of each tensor by what ``pack_shares`` gave on each rank. No communication."""
    sums = np.zeros((len(names), 2), np.uint64)
    for part in parts:
        flags, digests = part.split(" ")
        # A name is in a part once. Sums are mod 2**64, as they wrap around.
        sums[unpack_flags(flags, len(names))] += np.frombuffer(base64.b64decode(digests), np.uint64).reshape(-1, 2)
    return {name: Digest(*row) for name, row in zip(names, sums.tolist(), strict=True)}
