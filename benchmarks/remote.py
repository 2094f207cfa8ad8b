"""Saves to an S3 server of this machine: ours, plain multipart puts of the same bytes, and ``dcp.save`` through fsspec.

A float32 Llama with AdamW and an average. A first, uncounted round makes buffers and clients. Times are of the slowest
rank, processor time of all ranks together, without the server's; the medians of the other rounds.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.state_dict import get_state_dict

from benchmarks.checkpoint import sharded_llama
from benchmarks.rank_processes import spawn_ranks
from shardsmith.ground.object_store import PART_BYTES
from shardsmith.ground.remote_path import as_path
from shardsmith.hooks import EMA, ShardedSave, at
from tests.object_server import ObjectServer, running_server

_NEVER = at(10**9)
SAVE = "ShardedSave"
RESUME = "resume of it, verified"
CACHED = "ShardedSave(local_cache=...), uploaded"
PLAIN = "the same bytes by obstore, a multipart put a rank"
FSSPEC = "dcp.save, FsspecWriter over obstore, without a manifest"


def compare_remote(console: Console, work: Path, parameters: int, ranks: int, runs: int) -> dict[str, Any]:
    """Save in each way in turn, print the table; the figures.

    Args:
        console: Where to print.
        work: A directory for the server and its data.
        parameters: Size of the Llama.
        ranks: Number of ranks that hold it.
        runs: Rounds that count.
    """
    console.print(f"object store: a Llama of about {parameters / 1e6:.0f} M parameters on {ranks} ranks, SeaweedFS")
    with running_server(work / "server", volume_mb=2048) as server:
        found: dict[str, Any] = spawn_ranks(_bench, ranks, work / "remote", server, parameters, runs)
    table = Table("way", "seconds", "times plain puts", "training waits", "processor seconds")
    for name, figures in found.items():
        times = f"{figures['seconds'] / found[PLAIN]['seconds']:.1f}x"
        row = (f"{figures['seconds']:.2f}", times, f"{figures['stall']:.2f}", f"{figures['cpu_seconds']:.1f}")
        table.add_row(name, *row)
    console.print(table)
    return found


def _bench(rank: int, folder: Path, server: ObjectServer, parameters: int, runs: int) -> dict[str, Any]:
    server.use()
    model = sharded_llama(parameters)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    ema = EMA(model)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "ema": ema, "when": _NEVER}
    save = ShardedSave(server.url("save"), **state)
    cached = ShardedSave(server.url("cached"), local_cache=folder / "cache", **state)
    assert cached.local_cache is not None
    # One byte, until the first save shows how long a rank's file is.
    client, data = server.client(), os.urandom(1)

    def save_one(hook: ShardedSave, step: int) -> float:
        began = time.perf_counter()
        hook.save(step)
        stall = time.perf_counter() - began
        hook.saving(step).result()
        if hook.local_cache is not None:
            # The save is done when the step is in the store, and not when it is on the local disk.
            hook.local_cache.wait()
        return stall

    def resume(step: int) -> float:
        assert save.resume() == step
        return 0.0

    def plain(step: int) -> float:
        # With parts of our size and four at a time, as our own uploads have them.
        options: dict[str, Any] = {"use_multipart": True, "chunk_size": PART_BYTES, "max_concurrency": 4}
        obstore.put(client, f"plain/step-{step}/{rank}", data, **options)
        return 0.0

    def by_fsspec(step: int) -> float:
        began = time.perf_counter()
        model_state, optimizer_state = get_state_dict(model, optimizer)
        whole = {"model": model_state, "optimizer": optimizer_state, "ema": ema.state_dict()}
        dcp.save(whole, storage_writer=FsspecWriter(server.url(f"fsspec/step-{step}")))
        return time.perf_counter() - began

    _register_fsspec()
    ways: dict[str, Callable[[int], float]] = {
        SAVE: lambda step: save_one(save, step),
        RESUME: resume,
        CACHED: lambda step: save_one(cached, step),
        PLAIN: plain,
        FSSPEC: by_fsspec,
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for step in range(1, runs + 2):
        for name, body in ways.items():
            found[name].append(_measure(body, step))
            if name == SAVE and step == 1:
                sizes = as_path(server.url(f"save/step-{step}")).sizes()  # type: ignore[attr-defined]
                # Random bytes, which no layer in between can compress.
                data = os.urandom(sizes[f"__{rank}_0.distcp"])
    for hook in (save, cached):
        hook.close()
    return {
        name: {what: statistics.median(figures[what] for figures in rounds[1:]) for what in rounds[0]}
        for name, rounds in found.items()
    }


def _register_fsspec() -> None:
    from obstore.fsspec import register

    register("s3")


def _measure(body: Callable[[int], float], step: int) -> dict[str, float]:
    """All ranks run ``body``; the slowest, and of processor time the sum."""
    dist.barrier()
    cpu, began = _cpu_seconds(), time.perf_counter()
    stall = body(step)
    dist.barrier()
    worst = torch.tensor([time.perf_counter() - began, stall], dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    total = torch.tensor(_cpu_seconds() - cpu, dtype=torch.float64)
    dist.all_reduce(total)
    return {"seconds": worst[0].item(), "stall": worst[1].item(), "cpu_seconds": total.item()}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
