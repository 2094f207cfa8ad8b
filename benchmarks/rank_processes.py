"""Ranks of their own for a benchmark: processes that meet through a TCP store, as under torchrun.

They are forked from a server that has imported what ranks need and done nothing else: an import for each of them would
take longer than what a small benchmark measures.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from shardsmith.ground.process_end import finish

_PRELOADED = [
    "torch._dynamo",  # the first fully_shard wants it
    "torch.distributed.checkpoint",
    "transformers.models.llama.modeling_llama",
    "shardsmith.hooks",
    "benchmarks.checkpoint",
    "benchmarks.rank_processes",
]


def spawn_ranks(
    body: Callable[..., dict[str, Any]], ranks: int, folder: Path, *arguments: Any, backend: str = "gloo"
) -> dict[str, Any]:
    """Run on ranks of their own; what rank 0 returns."""
    result = folder.parent / f"{folder.name}-{body.__name__}.json"
    folder.mkdir(parents=True)
    # A TCP store in this process, as torchrun has it; a file store would be slower than any export.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = (body, ranks, store.port, backend, folder, result, arguments)
    # The server has no threads, no groups and no device of this process.
    multiprocessing.set_forkserver_preload(_PRELOADED)
    mp.start_processes(_rank, given, ranks, start_method="forkserver")
    shutil.rmtree(folder)
    content: dict[str, Any] = json.loads(result.read_text())
    return content


def _rank(
    rank: int,
    body: Callable[..., Any],
    ranks: int,
    port: int,
    backend: str,
    folder: Path,
    result: Path,
    arguments: Any,
) -> None:
    warnings.filterwarnings("ignore")
    # One thread a rank: all ranks share the cores of this machine.
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    # Returned through a file: it outlives this process, whatever its size.
    found = body(rank, folder, *arguments)
    if rank == 0:
        result.write_text(json.dumps(found))
    finish()
