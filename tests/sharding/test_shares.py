"""Shares of digests add up to the digest of the whole tensor, whoever holds which box."""

from __future__ import annotations

import torch

from shardsmith.sharding.shares import add_up_boxes, add_up_ranks
from shardsmith.tensors.digest import Digest, digest_box, digest_tensor
from shardsmith.tensors.tensors import Chunk


def share(tensor: torch.Tensor, box: Chunk) -> str:
    return str(digest_box(tensor[box.slices], box, tuple(tensor.shape)))


def test_boxes_that_several_ranks_hold_count_once() -> None:
    tensor = torch.randn(6, 4)
    upper, lower = Chunk((0, 0), (3, 4)), Chunk((3, 0), (3, 4))
    held = [("w", box, share(tensor, box)) for box in (upper, lower, lower, upper)]

    totals = add_up_boxes(held)

    assert totals.digests == {"w": digest_tensor(tensor)}
    assert not totals.differing


def test_replicas_with_other_values_are_named_and_the_first_counts() -> None:
    ours, theirs, whole = torch.randn(6), torch.randn(6), Chunk.whole((6,))

    totals = add_up_boxes([("w", whole, share(ours, whole)), ("w", whole, share(theirs, whole))])

    assert totals.digests == {"w": digest_tensor(ours)}
    assert totals.differing == {"w"}


def test_equal_shares_of_two_ranks_both_count_and_what_no_rank_looked_at_is_nothing() -> None:
    zeros = str(digest_tensor(torch.ones(2)))

    digests = add_up_ranks([{"w": zeros}, {"w": zeros}, {}], ["w", "empty"])

    assert digests == {"w": Digest.parse(zeros) + Digest.parse(zeros), "empty": Digest()}
