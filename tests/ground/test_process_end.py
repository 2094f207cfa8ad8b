from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shardsmith.hooks import finish
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


def run_without_the_last(limit: float) -> None:
    if dist.get_rank() == 0:
        finish(limit)
        assert not dist.is_initialized()
    else:
        dist.destroy_process_group()


def test_a_rank_that_never_comes_is_not_waited_for_longer_than_was_said(tmp_path: Path) -> None:
    run_on_ranks(run_without_the_last, 2, tmp_path, 0.2)


@pytest.mark.long
def test_scripts_of_every_kind_of_group_end_with_the_interpreter() -> None:
    command = [sys.executable, "-m", "tests.soak.ends", "2"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("{'0': 4}") == 4
