from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException

from shardsmith.errors import UsageError
from shardsmith.ground import process_end
from shardsmith.hooks import finish
from tests.ground.stopped_store import run_beside_stopped_store
from tests.ranks import run_on_ranks


def run_finish() -> None:
    group = dist.new_group(backend="gloo")
    parts = [torch.empty(1000) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, torch.ones(1000), group=group)
    finish()
    assert not dist.is_initialized()
    finish()  # there is nothing left to end


def test_every_group_is_ended_once(tmp_path: Path) -> None:
    run_on_ranks(run_finish, 3, tmp_path)


@pytest.mark.parametrize("secs", [0, -1.0, float("inf"), float("nan"), 1e300, 10**400, True, "60"])
def test_a_time_that_cannot_be_waited_is_refused_also_without_a_process_group(secs: Any) -> None:
    with pytest.raises(UsageError, match=r"finish: timeout_secs=.*: a number of seconds above 0 .* 1e\+09 at most"):
        finish(secs)


def run_without_the_last(limit: float) -> None:
    if dist.get_rank() == 0:
        finish(limit)
        assert not dist.is_initialized()
    else:
        dist.destroy_process_group()


def test_a_rank_that_never_comes_is_not_waited_for_longer_than_was_said(tmp_path: Path) -> None:
    run_on_ranks(run_without_the_last, 2, tmp_path, 0.2)


def warnings_of_finish(limit: float) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger(process_end.__name__)
    log.addHandler(handler)
    finish(limit)
    log.removeHandler(handler)
    assert not dist.is_initialized()
    return lines


def run_without_one(folder: Path) -> None:
    rank = dist.get_rank()
    if rank == 2:
        while len([*folder.iterdir()]) < 2:  # alive until the others have ended
            time.sleep(0.05)
        dist.destroy_process_group()
        return
    first, *_ = warnings_of_finish(0.5)
    assert first.startswith("not all ranks came to the end: no word of rank 2: ")
    assert first.endswith(" within 0.5 s")
    (folder / str(rank)).touch()


def test_all_ranks_say_which_one_did_not_come(tmp_path: Path) -> None:
    folder = tmp_path / "ended"
    folder.mkdir()
    run_on_ranks(run_without_one, 3, tmp_path, folder)


FINISH = """
from shardsmith.ground import process_end
from shardsmith.ground.liveness import answer_from_now_on
answer_from_now_on()
process_end._ANSWER_SECS = 1.0
stop_store()
process_end.finish(0.5)
print("initialized" if dist.is_initialized() else "ended", flush=True)
os._exit(0)
"""


def test_a_store_that_does_not_answer_is_not_waited_for_for_ever() -> None:
    done = run_beside_stopped_store(FINISH)
    assert done.stdout == "ended\n", done.stderr
    assert "the job's store, which rank 0 or the launcher holds, does not answer" in done.stderr


def run_with_a_pending_collective(ended: Path) -> None:
    if dist.get_rank() == 1:
        while not ended.exists():
            time.sleep(0.05)
        os._exit(0)
    process_end._DESTROY_SECS, process_end._IDLE_SECS = 2.0, 0.1
    dist.all_reduce(torch.ones(3), async_op=True)
    finish(0.5)


def test_groups_that_torch_cannot_end_end_the_process(tmp_path: Path) -> None:
    with pytest.raises(ProcessExitedException, match="exit code 1"):
        run_on_ranks(run_with_a_pending_collective, 2, tmp_path, tmp_path / "ended")


@pytest.mark.long
def test_scripts_of_every_kind_of_group_and_an_example_end_with_the_interpreter() -> None:
    command = [sys.executable, "-m", "tests.soak.ends", "1", "ddp", "fsdp1", "fsdp2", "accelerate", "fsdp2_loop.py"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("{'0': 2}") == 5
