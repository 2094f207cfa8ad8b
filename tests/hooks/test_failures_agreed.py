"""What fails in the background is raised on all ranks after the same step, however far apart they are."""

from __future__ import annotations

import logging
import resource
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardsmith.errors import RankFailedError
from shardsmith.hooks import HFExport, Hook, Hooks, Recorder, ShardedSave, at
from tests.ranks import run_on_ranks


def test_a_failure_on_one_rank_is_raised_on_all_after_the_same_step(tmp_path: Path) -> None:
    run_on_ranks(run_failures, 2, tmp_path, tmp_path)


def run_failures(directory: Path) -> None:
    logging.disable()  # the errors in the background thread are meant to happen
    model = nn.Linear(2048, 1024)
    fully_shard(model)
    save = ShardedSave(directory / "checkpoints", model=model, when=at(1))
    check_raised_together(save, lambda: None, "File too large")
    export = HFExport(directory / "hf", model=model, when=at(1))
    check_raised_together(export, lambda: None, "File too large")
    recorder = Recorder(directory / "trainer", model=model)
    check_raised_together(recorder, lambda: record(recorder), "OSError: no space")


def record(recorder: Recorder) -> None:
    end: Future[None] = Future()
    if dist.get_rank() == 1:
        end.set_exception(OSError("no space"))
    else:
        end.set_result(None)
    path = recorder.directory / "step-1"
    recorder.begin(path)
    recorder.saved(1, path, end)


def check_raised_together(hook: Hook, begin: Callable[[], None], said: str) -> None:
    hooks = Hooks(hook)
    rank = dist.get_rank()
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    begin()
    step, error = 0, None
    while error is None:
        step += 1
        sum(range(20_000 * (1 + 2 * rank)))  # a step takes three times as long on one rank as on the other
        try:
            hooks.step(step)
        except RankFailedError as raised:
            error = str(raised)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (step, error))
    assert everywhere[0] == everywhere[1]
    assert "rank 1: " in error
    assert said in error
    hooks.step(step + 1)  # it is raised once
    hooks.close()
