"""Ranks of their own for a benchmark: processes that meet through a TCP store, as under torchrun."""

from __future__ import annotations

import json
import shutil
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from shardsmith.ground.process_end import finish


def spawn_ranks(
    body: Callable[..., dict[str, Any]], ranks: int, folder: Path, *arguments: Any, backend: str = "gloo"
) -> dict[str, Any]:
    """Run on ranks of their own; what rank 0 returns."""
    result = folder.parent / f"{folder.name}-{body.__name__}.json"
    folder.mkdir(parents=True)
    with socket.socket() as probe:  # a TCP store, as torchrun has it; a file store would be slower than any export
        probe.bind(("127.0.0.1", 0))
        store = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    mp.start_processes(_rank, (body, ranks, store, backend, folder, result, arguments), ranks, start_method="spawn")
    shutil.rmtree(folder)
    content: dict[str, Any] = json.loads(result.read_text())
    return content


def _rank(
    rank: int,
    body: Callable[..., Any],
    ranks: int,
    store: str,
    backend: str,
    folder: Path,
    result: Path,
    arguments: Any,
) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=ranks)
    found = body(rank, folder, *arguments)
    if rank == 0:
        result.write_text(json.dumps(found))
    finish()
