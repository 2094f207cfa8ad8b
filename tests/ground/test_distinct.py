"""Long values that most ranks have alike are sent once."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from shardsmith.ground import ranks as ground_ranks
from shardsmith.ground.distinct import agree_on_distinct
from shardsmith.ground.ranks import Ranks
from tests.ranks import error_of_all, run_on_ranks

LONG = "x" * 5_000_000
"""More than a value may have that is not meant to be long."""


def run_distinct() -> None:
    rank, ranks, put = dist.get_rank(), Ranks(), Ranks._put
    told: list[int] = []

    def counted(self: Ranks, key: str, outcome: ground_ranks._Outcome) -> list[str]:
        told.append(len(outcome.encode()))
        return put(self, key, outcome)

    Ranks._put = counted  # type: ignore[method-assign]
    value = {"stage": rank // 2, "text": LONG}
    found = agree_on_distinct(ranks, "telling", lambda: value, lambda values: [one["stage"] for one in values])
    assert found == [0, 1]
    # Rank 0 does not send to itself; of ranks 2 and 3, which have the same, the lower one sends.
    assert (max(told) > len(LONG)) == (rank == 2)
    assert "rank 3: KeyError" in error_of_all(
        lambda: agree_on_distinct(ranks, "failing", lambda: {}["a"] if rank == 3 else 1, lambda _: None)
    )
    assert "ValueError: [1]" in error_of_all(lambda: agree_on_distinct(ranks, "failing", lambda: 1, refuse))


def refuse(values: list[int]) -> None:
    raise ValueError(values)


def test_of_ranks_that_have_the_same_one_sends_it(tmp_path: Path) -> None:
    run_on_ranks(run_distinct, 4, tmp_path)
