"""A run that saves, exports, averages, agrees on a stop and resumes makes no process group but those of its model.

Nor does it open a connection to the job's store for each hook.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from shardsmith.ground import liveness
from tests.hooks.training import build, run_training
from tests.ranks import run_on_ranks


@pytest.mark.parametrize(("sharding", "ranks"), [("fsdp2", 2), ("fsdp1", 2), ("ddp", 2), ("hsdp", 4)])
def test_a_run_makes_no_process_group_of_its_own(sharding: str, ranks: int, tmp_path: Path) -> None:
    run_on_ranks(run_counted, ranks, tmp_path, sharding, tmp_path)


def run_counted(sharding: str, directory: Path) -> None:
    made: list[Any] = []
    make = distributed_c10d._new_process_group_helper  # through which every way to make one goes

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(args)
        return make(*args, **kwargs)

    distributed_c10d._new_process_group_helper = counted
    build(sharding)
    of_model = len(made)
    run, exports = directory / "run", directory / "exports"
    assert run_training(run, 20, sharding=sharding, export_to=exports, stop_after=7) < 20
    assert run_training(run, 20, sharding=sharding, export_to=exports) == 20
    assert len(made) == 3 * of_model
    dist.new_group(backend="gloo")  # it would have been seen
    assert len(made) == 3 * of_model + 1


def test_a_process_has_few_connections_to_the_store_however_many_hooks(tmp_path: Path) -> None:
    run_on_ranks(run_connected, 2, tmp_path, tmp_path)


def run_connected(directory: Path) -> None:
    opened: list[str] = []
    store = liveness._default_store()

    class Counted:
        """The job's store, which is asked for each connection."""

        def clone(self) -> Any:
            opened.append("")
            return store.clone()

    counted = Counted()
    liveness._default_store = lambda: counted
    assert run_training(directory / "run", 20, sharding="fsdp2", export_to=directory / "hf", stop_after=7) < 20
    of_one_run = len(opened)
    assert 0 < of_one_run <= 3  # one for all that returns at once; the threads for signs of life and for notices block
    assert run_training(directory / "run", 20, sharding="fsdp2", export_to=directory / "hf") == 20
    assert len(opened) == of_one_run + 1  # that of the second run's notices
