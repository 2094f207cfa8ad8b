"""The device that the tests of this folder train on, and ranks that train there."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from shardsmith.ground.process_end import finish

VARIABLE = "SHARDSMITH_TEST_DEVICE"
"""Environment variable with the type of the device; ``python -m tests.gpu`` sets it, for the ranks, too."""
BOTH = "cpu:gloo,cuda:nccl"
_PRELOADED = ["torch.distributed.checkpoint", "torch.distributed.fsdp", "tests.gpu.devices"]


def device() -> torch.device:
    """Where the tests train: the CPU, unless ``VARIABLE`` says something else."""
    kind = os.environ.get(VARIABLE, "cpu")
    return torch.device(kind, torch.accelerator.current_device_index()) if kind != "cpu" else torch.device("cpu")


def is_on_accelerator() -> bool:
    return os.environ.get(VARIABLE, "cpu") != "cpu"


def run_on_ranks(
    body: Callable[..., None], ranks: int, tmp_path: Path, *args: Any, backend: str = "gloo", timeout_secs: int = 60
) -> None:
    """Call ``body(*args)``, a function of a module, on each of several ranks; all of them train on one device."""
    multiprocessing.set_forkserver_preload(_PRELOADED)
    store = f"file://{tmp_path}/store-{uuid.uuid4().hex}"
    mp.start_processes(_rank, (body, ranks, store, backend, timeout_secs, args), ranks, start_method="forkserver")


def _rank(
    rank: int,
    body: Callable[..., None],
    ranks: int,
    store: str,
    backend: str,
    timeout_secs: int,
    args: tuple[Any, ...],
) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    if is_on_accelerator():
        torch.accelerator.set_device_index(0)
    dist.init_process_group(
        backend, init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout_secs)
    )
    body(*args)
    finish(20.0)


def delay_stream() -> None:
    """Keep the current stream of an accelerator busy, so that what is launched next has not run for a while."""
    if device().type == "cuda":
        torch.cuda._sleep(200_000_000)  # about a tenth of a second


@contextlib.contextmanager
def other_stream() -> Iterator[None]:
    """Train on a stream that is not the default one, where there are streams."""
    if not is_on_accelerator():
        yield
        return
    stream = torch.Stream(device=device())
    stream.wait_stream(torch.accelerator.current_stream())
    with stream:
        yield
    torch.accelerator.current_stream().wait_stream(stream)
