"""Ranks that are far apart act after the same step."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from shardsmith.ground import step_agreement
from shardsmith.ground.step_agreement import StepAgreement
from tests.ground.counted_stores import run_ranks_in_threads
from tests.ground.stopped_store import run_beside_stopped_store
from tests.ranks import run_on_ranks


def test_all_ranks_have_what_any_told_after_the_same_step_whatever_their_pace(tmp_path: Path) -> None:
    run_on_ranks(run_apart, 3, tmp_path)


def run_apart() -> None:
    rank = dist.get_rank()
    agreement = StepAgreement()
    found: list[tuple[int, Any]] = []
    step = 0
    for word in range(3):
        if rank == word:  # another one each time, and the others do not wait for it, nor does it for them
            threading.Thread(target=agreement.tell, args=([word],)).start()
        while len(found) <= word:
            step += 1
            found += [(step, notice) for notice in agreement.due(step)]
            sum(range(10_000 * (1 + rank)))  # steps take up to three times as long on one rank as on another
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    assert everywhere == [everywhere[0]] * 3
    assert [notice for _, notice in found] == [[0], [1], [2]]
    agreement.close()


def test_what_is_told_before_a_step_ends_is_due_after_it_if_no_rank_has_finished_it(tmp_path: Path) -> None:
    run_on_ranks(run_at_once, 2, tmp_path)


def run_at_once() -> None:
    agreement = StepAgreement()
    assert agreement.due(6) == []
    dist.barrier()
    if dist.get_rank() == 1:
        agreement.tell(["one"])
        agreement.tell(["one"])
        assert agreement.due(7) == [["one"]]
    dist.barrier()
    if dist.get_rank() == 0:
        assert agreement.due(7) == [["one"]]
    dist.barrier()
    agreement.close()


def test_a_rank_that_has_closed_holds_up_nobody(tmp_path: Path) -> None:
    run_on_ranks(run_closed, 2, tmp_path)


def run_closed() -> None:
    agreement = StepAgreement()
    if dist.get_rank() == 0:
        agreement.close()
    dist.barrier()
    agreement.tell([dist.get_rank()])
    assert agreement.due(1) == [[dist.get_rank()]]  # each for itself
    agreement.close()


def test_a_verdict_stays_until_all_have_read_it_also_if_rank_0_closes(tmp_path: Path) -> None:
    run_on_ranks(run_slow_reader, 2, tmp_path)


def run_slow_reader() -> None:
    """Rank 1 has seen that the verdict is there, and reads it when rank 0 has closed."""
    agreement = StepAgreement()
    if dist.get_rank() == 1:
        wait, seen = agreement._await, threading.Event()

        def slowly(*args: Any) -> None:
            wait(*args)
            if not seen.is_set():
                seen.set()
                store = step_agreement.own_connection()
                store.set("seen", b"")
                store.wait(["closed"])

        agreement._await = slowly  # type: ignore[method-assign]
        agreement.tell("stop")
        assert agreement.due(1) == ["stop"]
    else:
        store = step_agreement.own_connection()
        store.wait(["seen"])
        agreement.close()
        store.set("closed", b"")
    agreement.close()
    dist.barrier()


CLOSE = """
from shardsmith.ground.step_agreement import StepAgreement
agreement = StepAgreement(0.5)
stop_store()
agreement.close()
print("closed", flush=True)
os._exit(0)
"""


def test_a_store_that_does_not_answer_is_not_waited_for_for_ever() -> None:
    done = run_beside_stopped_store(CLOSE)
    assert done.stdout == "closed\n", done.stderr
    assert "the job's store, which rank 0 or the launcher holds, does not answer" in done.stderr


def test_one_rank_has_everything_at_once() -> None:
    agreement = StepAgreement()
    agreement.tell("a")
    assert agreement.due(1) == ["a"]
    assert agreement.due(2) == []
    agreement.close()


@pytest.mark.parametrize("size", [2, 8, 64])
def test_a_round_costs_a_rank_as_many_operations_however_many_ranks_there_are(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    met = threading.Barrier(size)

    def body(rank: int) -> None:
        agreement = StepAgreement()
        met.wait()
        if rank == size - 1:
            agreement.tell("stop")
        found: list[Any] = []
        step = 0
        while not found:
            step += 1
            found = agreement.due(step)
            met.wait()  # as a step of the training, which no rank ends before the others are in it
        assert found == ["stop"]
        met.wait()
        agreement.close()

    first, *others = run_ranks_in_threads(body, size, step_agreement, monkeypatch)
    # An answer; word, from the rank that tells; and as much again when they close, if the first has not ended it.
    assert all(counts["set"] <= 5 for counts in others)
    assert sum(counts["set"] for counts in others) <= 3 * size
    assert all(counts["get"] <= 2 and not counts["multi_get"] for counts in others)
    assert all(counts["check, most keys"] == 1 for counts in others)
    assert 1 <= first["multi_get"] <= 2
    assert first["multi_get, most keys"] == size
    assert first["check, most keys"] <= 64
    assert first["set"] <= 6
