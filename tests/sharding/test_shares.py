"""Shares of digests add up to the digest of the whole tensor."""

from __future__ import annotations

import torch

from shardsmith.sharding.shares import add_up_ranks
from shardsmith.tensors.digest import Digest, digest_tensor


def test_equal_shares_of_two_ranks_both_count_and_what_no_rank_looked_at_is_nothing() -> None:
    zeros = str(digest_tensor(torch.ones(2)))

    digests = add_up_ranks([{"w": zeros}, {"w": zeros}, {}], ["w", "empty"])

    assert digests == {"w": Digest.parse(zeros) + Digest.parse(zeros), "empty": Digest()}
