"""Shares of digests add up to the digest of the whole tensor."""

from __future__ import annotations

import torch

from shardsmith.sharding.shares import add_up_shares, pack_shares
from shardsmith.tensors.digest import Digest, digest_run, digest_tensor


def test_shares_of_any_ranks_add_up_and_what_no_rank_looked_at_is_nothing() -> None:
    names = [f"t{i}" for i in range(20)]
    whole = {name: torch.randn(30) for name in names[1:]}
    parts = []
    for rank in range(5):
        # Each rank has looked at another run of elements, and at nothing of some tensors.
        runs = {n: t[rank * 6 : rank * 6 + 6] for n, t in whole.items() if rank or n != "t3"}
        parts.append(pack_shares({name: digest_run(run, rank * 6) for name, run in runs.items()}, names))
    whole["t3"][:6] = 0
    assert add_up_shares(parts, names) == {"t0": Digest(), **{name: digest_tensor(t) for name, t in whole.items()}}


def test_equal_shares_of_two_ranks_both_count() -> None:
    share = digest_tensor(torch.ones(2))
    assert add_up_shares([pack_shares({"w": share}, ["w"])] * 2, ["w"]) == {"w": share + share}
