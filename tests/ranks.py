"""Run a function on several real ranks (Gloo, processes, file:// rendezvous); a failing rank fails the test.

The ranks are forked from a server that has imported torch, transformers and Shardsmith and done nothing else: starting
one takes some 10 ms instead of seconds.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from shardsmith.errors import RankFailedError
from shardsmith.sharding import staged_copy

SMALL_BYTES = staged_copy.SMALL_BYTES
staged_copy.SMALL_BYTES = 0  # the tensors of tests are small, and are to be copied as large ones are

_HUNG_SECS = 250.0
"""Shortly before pytest ends a test: to read the frames of a rank that is not hung but slow can crash it."""
PRELOADED = [
    "hypothesis",
    "numpy.ma",  # np.unique imports it when it is called first
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "transformers.trainer",
    "shardsmith.hooks",
    "shardsmith.manager",
    "tests.forked",
    "tests.ranks",
]


def run_on_ranks(
    body: Callable[..., None],
    world_size: int,
    tmp_path: Path,
    *args: Any,
    timeout_secs: int = 60,
    preload: Sequence[str] = PRELOADED,
) -> None:
    """Call ``body(*args)`` on each of ``world_size`` ranks. ``body`` is a function of a module.

    ``preload`` are the modules that the server imports; it starts with the first ranks and then stays as it is.
    """
    store = tmp_path / f"store-{uuid.uuid4().hex}"
    multiprocessing.set_forkserver_preload([*preload, "tests.frozen"])
    mp.start_processes(
        _rank, (body, world_size, f"file://{store}", timeout_secs, args), world_size, start_method="forkserver"
    )


def _rank(
    rank: int, body: Callable[..., None], world_size: int, store: str, timeout_secs: int, args: tuple[Any, ...]
) -> None:
    """Ends by ``os._exit``, as every process of a fork server: groups that are left are not taken down."""
    faulthandler.enable()  # a rank that crashes says where all of its threads were
    faulthandler.dump_traceback_later(_HUNG_SECS)  # and so does one that hangs
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_secs)
    )
    body(*args)


def error_of_all(act: Callable[[], object]) -> str:
    """Return the text of the ``RankFailedError`` that ``act`` raises on every rank; the same on each."""
    with pytest.raises(RankFailedError) as error:
        act()
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, str(error.value))
    assert len(set(texts)) == 1
    return str(error.value)
