from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from shardsmith.errors import RankError, RankFailedError, RanksDisagreeError, RankTimeoutError
from shardsmith.ground import liveness
from shardsmith.ground import ranks as ground_ranks
from shardsmith.ground.liveness import ANSWER_SECS, SilenceError, await_keys, find_dead
from shardsmith.ground.process_end import meet
from shardsmith.ground.ranks import _DELETED_AT_ONCE, Ranks
from tests.forked import run_forked
from tests.ground.counted_stores import Counted
from tests.ranks import run_on_ranks

PROMPT_SECS = 30.0
"""Below any limit of time that is waited for here, and long enough for a busy machine."""


def fail(error: BaseException) -> None:
    raise error


def caught(act: Callable[[], object], kind: type[RankError] = RankFailedError) -> RankError:
    """The error that ``act`` raises, and promptly."""
    started = time.monotonic()
    with pytest.raises(kind) as error:
        act()
    assert time.monotonic() - started < PROMPT_SECS
    return error.value


def assert_in_step(ranks: Ranks) -> None:
    """Ranks and the process group can go on together."""
    gathered = ranks.gather("after", lambda: ranks.rank)
    assert gathered == (list(range(ranks.size)) if ranks.is_leader else [])
    assert ranks.lead("after", lambda: "word") == "word"
    total = torch.ones(())
    dist.all_reduce(total)
    assert total == ranks.size


def test_ranks_agree_and_tell_each_other_of_their_errors(tmp_path: Path) -> None:
    run_on_ranks(run_agreement, 3, tmp_path)


def run_agreement() -> None:
    check_gather_gives_rank_0_all_values_in_rank_order()
    check_lead_gives_all_ranks_the_value_of_rank_0()
    check_two_of_them_do_not_mix()
    check_an_error_on_any_rank_is_raised_on_all_with_its_rank_phase_and_type()
    check_errors_on_several_ranks_are_all_named()
    check_torchs_checkpoint_exception_is_carried_too()
    check_a_rank_that_is_to_end_tells_the_others_and_ends()
    check_a_rank_that_does_not_take_part_says_so_and_goes_on()
    check_the_cause_is_kept_on_the_rank_that_raised()
    check_a_rank_in_another_phase_is_an_error_and_not_an_answer()
    check_a_background_thread_may_use_it_while_the_main_thread_trains()
    check_the_store_does_not_grow()


def check_gather_gives_rank_0_all_values_in_rank_order() -> None:
    ranks = Ranks()
    assert (ranks.rank, ranks.size, ranks.is_leader) == (dist.get_rank(), 3, dist.get_rank() == 0)
    values = ranks.gather("counting", lambda: {"rank": ranks.rank, "text": "ä\n", "none": None, "list": [1.5]})
    expected = [{"rank": r, "text": "ä\n", "none": None, "list": [1.5]} for r in range(3)]
    assert values == (expected if ranks.is_leader else [])


def check_lead_gives_all_ranks_the_value_of_rank_0() -> None:
    ranks = Ranks()
    assert ranks.lead("leading", lambda: f"from {ranks.rank}") == "from 0"
    assert ranks.lead("leading", lambda: None) is None
    acted: list[int] = []
    ranks.lead("leading", lambda: acted.append(ranks.rank))
    assert acted == ([0] if ranks.is_leader else [])


def check_two_of_them_do_not_mix() -> None:
    first, second = Ranks(), Ranks()
    assert first.lead("phase", lambda: "first") == "first"
    assert second.lead("phase", lambda: "second") == "second"


def check_an_error_on_any_rank_is_raised_on_all_with_its_rank_phase_and_type() -> None:
    ranks = Ranks()
    for culprit in range(3):
        body = (lambda: fail(OSError("full"))) if ranks.rank == culprit else (lambda: None)
        error = caught(lambda body=body: ranks.gather("writing step-3", body))
        assert error.failures == {culprit: "OSError: full"}
        assert error.phase == "writing step-3"
        assert str(error) == f"writing step-3 failed on 1 of 3 ranks\n  rank {culprit}: OSError: full"
        assert_in_step(ranks)
    error = caught(lambda: ranks.lead("committing", lambda: fail(KeyError("x"))))
    assert (error.phase, error.failures) == ("committing", {0: "KeyError: 'x'"})
    assert_in_step(ranks)


def check_errors_on_several_ranks_are_all_named() -> None:
    ranks = Ranks()
    error = caught(lambda: ranks.gather("writing", lambda: fail(ValueError(ranks.rank))))
    assert error.failures == {rank: f"ValueError: {rank}" for rank in range(3)}
    assert_in_step(ranks)


def check_torchs_checkpoint_exception_is_carried_too() -> None:
    ranks = Ranks()
    assert not issubclass(CheckpointException, Exception)
    raised = CheckpointException("upload", {2: (OSError("full"), None)})
    error = caught(lambda: ranks.gather("writing", lambda: ranks.rank == 1 and fail(raised)))
    assert error.failures[1].startswith("CheckpointException: ")
    assert_in_step(ranks)


ACTS: dict[str, Callable[[Ranks, Callable[[], Any]], Any]] = {
    "gather": lambda ranks, body: ranks.gather("working", body),
    "agree": lambda ranks, body: ranks.agree("working", body, len),
    "lead": lambda ranks, body: ranks.lead("working", body),
}


def ranks_of(act: str) -> range:
    """Those on which it runs something."""
    return range(1 if act == "lead" else dist.get_world_size())


def check_a_rank_that_is_to_end_tells_the_others_and_ends() -> None:
    for kind, act in itertools.product((KeyboardInterrupt, SystemExit), ACTS):
        for ending in ranks_of(act):
            end_on(ending, kind("enough"), act)


def end_on(ending: int, error: BaseException, act: str) -> None:
    ranks, started = Ranks(), time.monotonic()
    with pytest.raises(type(error) if ranks.rank == ending else RankFailedError) as failed:
        ACTS[act](ranks, lambda: fail(error) if ranks.rank == ending else None)
    if isinstance(failed.value, RankFailedError):
        assert failed.value.failures == {ending: f"{type(error).__name__}: enough"}
    assert time.monotonic() - started < PROMPT_SECS
    assert_in_step(ranks)


def check_a_rank_that_does_not_take_part_says_so_and_goes_on() -> None:
    for act in ACTS:
        for absent in ranks_of(act):
            refuse_on(absent, act)


def refuse_on(absent: int, act: str) -> None:
    ranks = Ranks()
    if ranks.rank == absent:
        ranks.refuse("not working", ValueError("not with me"))
    else:
        failed = caught(lambda: ACTS[act](ranks, lambda: None))
        assert isinstance(failed, RankFailedError)
        assert failed.failures == {absent: "ValueError: not with me"}
    assert_in_step(ranks)


def check_the_cause_is_kept_on_the_rank_that_raised() -> None:
    ranks = Ranks()
    original = ValueError("here")
    error = caught(lambda: ranks.gather("writing", lambda: ranks.rank == 1 and fail(original)))
    assert error.__cause__ is (original if ranks.rank == 1 else None)
    error = caught(lambda: ranks.lead("leading", lambda: fail(original)))
    assert error.__cause__ is (original if ranks.is_leader else None)


def check_a_rank_in_another_phase_is_an_error_and_not_an_answer() -> None:
    ranks = Ranks()
    name = "writing step-1" if ranks.rank else "writing step-2"
    error = caught(lambda: ranks.gather(name, lambda: 1))
    assert error.failures.keys() == {1, 2}
    assert "writing step-1" in error.failures[1]
    if ranks.is_leader:
        ranks.lead(name, lambda: 1)
    else:
        assert "rank 0 at 'writing step-2'" in str(caught(lambda: ranks.lead(name, lambda: 1), RanksDisagreeError))
    assert_in_step(ranks)


def check_the_store_does_not_grow() -> None:
    ranks = Ranks()
    store = dist.distributed_c10d._get_default_store()

    def go_through_the_phases_of_a_save() -> None:
        ranks.gather("collecting", lambda: 1)
        ranks.lead("making the directory", lambda: 1)
        ranks.lead("agreeing", lambda: 1)
        ranks.gather("writing", lambda: 1)
        ranks.lead("committing", lambda: 1)

    before = store.num_keys()
    for _ in range(40):  # 360 keys
        go_through_the_phases_of_a_save()
    while store.num_keys() > before + 2 * _DELETED_AT_ONCE:  # they go in batches, in a thread of rank 0
        os.sched_yield()
    dist.barrier()


def check_a_background_thread_may_use_it_while_the_main_thread_trains() -> None:
    ranks = Ranks()
    rounds: list[list[int]] = []

    def work() -> None:
        for i in range(60):
            rounds.append(ranks.gather(f"round {i}", lambda: ranks.rank))
            assert ranks.lead(f"round {i}", lambda i=i: i) == i
            if i % 20 == 19:  # errors do not disturb the main thread either
                caught(lambda: ranks.gather("failing", lambda: fail(OSError("full"))))

    thread = threading.Thread(target=work)
    thread.start()
    collectives = 0
    go_on = torch.ones(())
    while go_on:  # until the threads of both ranks have ended
        dist.barrier()
        group = dist.new_group(backend="gloo")
        go_on.fill_(thread.is_alive())
        dist.all_reduce(go_on, op=dist.ReduceOp.MAX, group=group)
        collectives += 1
    thread.join()
    assert collectives > 1
    assert rounds == [[0, 1, 2] if ranks.is_leader else []] * 60


def test_slow_and_dead_ranks_are_named_by_all_others_in_time(tmp_path: Path) -> None:
    run_on_ranks(run_with_slow_and_dead_rank, 3, tmp_path)


def test_a_dead_rank_0_is_named_by_the_others_in_time(tmp_path: Path) -> None:
    run_on_ranks(run_without_rank, 2, tmp_path, 0)


def run_with_slow_and_dead_rank() -> None:
    check_a_slow_rank_finds_its_place_again_after_the_others_gave_up()
    run_without_rank(2)


def check_a_slow_rank_finds_its_place_again_after_the_others_gave_up() -> None:
    ranks = Ranks(timeout_secs=1.0)
    dist.barrier()
    store = dist.distributed_c10d._get_default_store()
    if ranks.rank == 1:
        store.wait(["gave up"])
    with pytest.raises(RankTimeoutError) as error:
        ranks.gather("writing", lambda: 1)
    assert error.value.missing == [1]
    if ranks.is_leader:
        store.set("gave up", "")
    dist.barrier()
    assert_in_step(ranks)


def run_without_rank(dead: int) -> None:
    ranks = Ranks(timeout_secs=2.0)
    dist.barrier()
    if ranks.rank == dead:
        os._exit(0)
    started = time.monotonic()
    with pytest.raises(RankTimeoutError, match="writing step-3: rank ") as error:
        ranks.gather("writing step-3", lambda: 1)
    assert (error.value.phase, error.value.missing) == ("writing step-3", [dead])
    assert time.monotonic() - started < PROMPT_SECS


@pytest.mark.parametrize("late", [False, True], ids=["at any time", "between two requests"])
def test_a_rank_that_dies_with_the_store_it_holds_is_named_too(late: bool, tmp_path: Path) -> None:
    run_forked(_run_with_tcp_store, 2, tmp_path / "port", late)


class ReadsWhenTheStoreHasGone:
    """A connection whose answer is asked for when whoever held the store has ended, though the key was there."""

    def __init__(self, store: Any, asked: Path) -> None:
        self.store = store
        self.asked = asked

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def get(self, key: str) -> bytes:
        self.asked.touch()
        while True:
            self.store.check([key])
            time.sleep(0.01)


def _run_with_tcp_store(rank: int, port_file: Path, late: bool) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    if store is not None:
        port_file.with_suffix(".tmp").write_text(str(store.port))
        port_file.with_suffix(".tmp").rename(port_file)
    while not port_file.exists():
        os.sched_yield()
    store = store or dist.TCPStore("127.0.0.1", int(port_file.read_text()))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    ranks = Ranks(timeout_secs=30)
    if rank == 0:
        ranks.gather("meeting", lambda: 1)
        while late and not port_file.with_suffix(".asked").exists():
            time.sleep(0.01)
        os._exit(0)
    if late:
        ranks._store = ReadsWhenTheStoreHasGone(ranks._store, port_file.with_suffix(".asked"))
    error = caught(lambda: [ranks.gather("meeting", lambda: 1), ranks.lead("committing", lambda: 1)], RankTimeoutError)
    assert error.missing == [0]
    os._exit(0)  # without the store the group cannot be taken down in good order


def test_one_rank_needs_no_process_group_and_raises_the_original_error() -> None:
    assert not dist.is_initialized()
    ranks = Ranks()
    assert (ranks.rank, ranks.size, ranks.is_leader) == (0, 1, True)
    assert ranks.gather("gathering", lambda: (1, 2)) == [(1, 2)]
    assert ranks.lead("leading", lambda: {1: 2}) == {1: 2}
    with pytest.raises(ZeroDivisionError):
        ranks.gather("gathering", lambda: 1 // 0)
    with pytest.raises(CheckpointException):
        ranks.lead("leading", lambda: fail(CheckpointException("upload", {})))


def test_a_dead_rank_is_known_in_seconds_and_a_slow_one_is_waited_for(tmp_path: Path) -> None:
    run_on_ranks(run_with_slow_then_dead_rank, 3, tmp_path)


def run_with_slow_then_dead_rank() -> None:
    ranks = Ranks(timeout_secs=3600.0)
    gathered = ranks.gather("writing", lambda: ranks.rank == 1 and _keep_others_waiting(3.5))
    assert gathered == ([False, None, False] if ranks.is_leader else []), "longer than until they look"
    if ranks.rank == 2:
        os._exit(0)
    started = time.monotonic()
    for _ in range(2):  # the second time without waiting again
        with pytest.raises(RankTimeoutError, match="rank 2 did not respond: no heartbeat") as error:
            ranks.gather("committing", lambda: 1)
        assert error.value.missing == [2]
    assert time.monotonic() - started < 3600 / 60


def test_who_is_known_to_be_dead_is_not_waited_for_again_by_anybody(tmp_path: Path) -> None:
    run_on_ranks(run_with_dead_rank_and_other_objects, 3, tmp_path)


def run_with_dead_rank_and_other_objects() -> None:
    saves, exports = Ranks(timeout_secs=3600.0), Ranks(timeout_secs=3600.0)
    saves.gather("in step", lambda: 1)
    if saves.rank == 2:
        os._exit(0)
    limits: list[float] = []

    def noted(asked: Sequence[int], store: Any, limit_secs: float) -> list[int]:
        limits.append(limit_secs)
        return find_dead(asked, store, limit_secs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(liveness, "find_dead", noted)
        with pytest.raises(RankTimeoutError, match="rank 2 did not respond: no heartbeat"):
            saves.gather("saving", lambda: 1)
        first = len(limits)
        with pytest.raises(RankTimeoutError, match="rank 2 did not respond: no heartbeat"):
            exports.gather("exporting", lambda: 1)
        meet("the end", 3600.0)
    if saves.is_leader:  # the other one waits for what rank 0 says
        assert limits[0] == ANSWER_SECS
        assert len(limits) == first + 2
        assert max(limits[first:]) <= 1.0


def _keep_others_waiting(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        os.sched_yield()


def test_what_is_large_travels_in_parts_where_it_is_meant_to(tmp_path: Path) -> None:
    run_on_ranks(run_large_values, 2, tmp_path)


def run_large_values() -> None:
    ranks = Ranks()
    long = "x" * (9 << 20)
    assert ranks.gather("telling", lambda: long, large=True) == ([long, long] if ranks.is_leader else [])
    assert ranks.lead("telling", lambda: long) == long
    assert ranks.agree("telling", lambda: long, lambda values: values[1], large=True) == long
    error = caught(lambda: ranks.gather("telling", lambda: long if ranks.rank else ""))
    assert "too many to tell the other ranks" in error.failures[1]
    assert_in_step(ranks)


def test_rank_0_reads_a_few_values_at_a_time(tmp_path: Path) -> None:
    run_on_ranks(run_read_in_turns, 6, tmp_path)


def run_read_in_turns() -> None:
    ranks = Ranks()
    ground_ranks._READ_AT_ONCE = 2
    counts = Counter[str]()
    ranks._store = Counted(ranks._store, counts)
    assert ranks.gather("telling", lambda: ranks.rank) == ([*range(6)] if ranks.is_leader else [])
    assert (counts["multi_get"], counts["multi_get, most keys"]) == ((3, 2) if ranks.is_leader else (0, 0))


def test_each_rank_is_dealt_its_own_and_told_nothing_of_the_others(tmp_path: Path) -> None:
    run_on_ranks(run_dealt, 3, tmp_path)


def run_dealt() -> None:
    ranks = Ranks()
    told = dict[str, int]()
    put = ranks._put

    def measured(key: str, outcome: Any) -> list[str]:
        told[key] = len(outcome.encode())
        return put(key, outcome)

    ranks._put = measured  # type: ignore[method-assign]
    long = "x" * (3 << 20)  # three parts
    for _ in range(2):
        own = ranks.deal("dealing", lambda: ranks.rank, lambda values: [f"{value}{long}" for value in values])
        assert own == f"{ranks.rank}{long}"
    if ranks.is_leader:
        assert sum(told.values()) < 2 * 2 * len(long) + 1000
    error = caught(lambda: ranks.deal("dealing", lambda: 1 // ranks.rank, lambda values: values))
    assert list(error.failures) == [0]
    error = caught(lambda: ranks.deal("dealing", lambda: 1, lambda values: [values[9]]))
    assert "IndexError" in error.failures[0]
    assert_in_step(ranks)


def test_waiting_for_a_slow_rank_prints_nothing_of_torchs(capfd: pytest.CaptureFixture[str]) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(SilenceError):
        await_keys(store.clone(), ["never"], [0], 1.5)
    store.set("there", b"")
    await_keys(store.clone(), ["there"], [0], 1.5)
    assert capfd.readouterr().err == ""


def test_waiting_for_a_rank_draws_nothing_from_the_training(tmp_path: Path) -> None:
    before = random.getstate(), torch.get_rng_state()
    with pytest.raises(SilenceError):
        await_keys(dist.FileStore(str(tmp_path / "store"), 1), ["never", "nor this"], [1, 2], 0.0)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
