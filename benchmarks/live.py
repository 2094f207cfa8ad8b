"""Live exports of sharded weights by real ranks: ``HFExport``, what people use instead, and the limits.

A first, uncounted round makes the buffers; memory is read in it, too. Times are of the slowest rank, the medians of
the other rounds.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from benchmarks.checkpoint import sharded_llama
from benchmarks.live_training import measure_alone, measure_steps
from benchmarks.measure import Peak, anonymous_bytes
from benchmarks.rank_processes import spawn_ranks
from shardsmith.hooks import HFExport, at

LIMIT = "4 processes that pwrite the same bytes"
CAST = "cast of the local shard into a buffer that is there"
OURS = "shardsmith HFExport"
FILES = 'shardsmith HFExport, write_mode="files"'
GATHER = "full gather on rank 0 + save_pretrained"
CONSOLIDATE = "HuggingFaceStorageWriter, consolidated"


def compare_live(console: Console, work: Path, parameters: int, ranks: int, runs: int) -> dict[str, Any]:
    """Export live weights with each contender in turn, print the table; the figures."""
    console.print(f"exporting a Llama of about {parameters / 1e6:.0f} M parameters from {ranks} live ranks in {work}")
    found = spawn_ranks(_bench, ranks, work / "ranks", parameters, runs)
    # alone, so that what is measured is the interpreter's lock and not several ranks on a few cores
    alone = spawn_ranks(measure_alone, 1, work / "alone", parameters // ranks)
    pauses, steps = alone["pauses"], {"one rank": alone["steps"], f"{ranks} ranks": found.pop("steps")}
    ours, cast, shard = found[OURS], found[CAST], parameters * 2 / ranks
    table = Table("way", "seconds", "times ours", "training waits", "times ours", "extra memory of a rank")
    for name, figures in found.items():
        table.add_row(
            name,
            f"{figures['seconds']:.2f}",
            f"{figures['seconds'] / ours['seconds']:.1f}x",
            f"{figures['stall']:.2f}",
            f"{figures['stall'] / ours['stall']:.1f}x",
            f"{figures['extra_bytes'] / 1e6:.0f} MB",
        )
    console.print(table)
    console.print(
        f"{OURS}: the training waits {ours['stall'] / cast['stall']:.2f}x as long as the bare cast takes; "
        f"a rank's shard in bfloat16 is {shard / 1e6:.0f} MB; the main thread's pauses while one rank writes: "
        f"p99 {pauses['p99'] * 1e3:.1f} ms, longest {pauses['max'] * 1e3:.1f} ms"
    )
    for name, figures in steps.items():
        console.print(
            f"training steps of {name} on {os.cpu_count()} cores, median: {figures['quiet'] * 1e3:.0f} ms, while an "
            f"export is written {figures['busy'] * 1e3:.0f} ms ({figures['busy'] / figures['quiet']:.2f}x)"
        )
    return {**found, "pauses": pauses, "steps": steps}


def _bench(rank: int, folder: Path, parameters: int, runs: int) -> dict[str, Any]:
    model = sharded_llama(parameters)
    export = HFExport(folder / "hf", model=model, when=at(10**9))
    # Bytes of a rank's share in bfloat16: as many files as ranks, so that each has one to write.
    share = f"{sum(parameter.numel() for parameter in model.parameters()) * 2 // dist.get_world_size()}"
    files = HFExport(folder / "hf", model=model, when=at(10**9), write_mode="files", max_shard_size=share)
    found: dict[str, list[dict[str, float]]] = {}
    for run in range(runs + 1):  # the first is a warm-up: buffers are made then, and memory is read there, too
        contenders: dict[str, Callable[[], float]] = {
            CAST: lambda: _cast(model),
            LIMIT: lambda: _pwrite(model, folder / "limit"),
            OURS: lambda step=run + 1: _ours(export, step),
            FILES: lambda step=run + 1: _ours(files, step),
            CONSOLIDATE: lambda: _consolidate(model, folder / "consolidated"),
            GATHER: lambda: _gather(model, folder / "gathered"),
        }
        for name, body in contenders.items():
            figures = _measure(body)
            if rank == 0:
                found.setdefault(name, []).append(figures)
            _clean(folder)
    steps = measure_steps(export)
    export.close()
    files.close()
    return {"steps": steps} | {
        name: {
            "seconds": statistics.median(run["seconds"] for run in figures[1:]),
            "stall": statistics.median(run["stall"] for run in figures[1:]),
            "extra_bytes": max(run["extra_bytes"] for run in figures),
        }
        for name, figures in found.items()
    }


def _measure(body: Callable[[], float]) -> dict[str, float]:
    """All ranks run ``body``, which returns how long the training waited; the slowest and the largest count."""
    # All begin together, and none is measured while another one still works.
    dist.barrier()
    before, began = anonymous_bytes("self"), time.perf_counter()
    with Peak() as peak:
        stall = body()
        dist.barrier()
    # One collective for all three numbers.
    worst = torch.tensor([time.perf_counter() - began, stall, float(peak.bytes - before)], dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return dict(zip(("seconds", "stall", "extra_bytes"), worst.tolist(), strict=True))


def _ours(export: HFExport, step: int) -> float:
    began = time.perf_counter()
    export.export(step)
    stall = time.perf_counter() - began
    export.wait()
    return stall


def _consolidate(model: nn.Module, output: Path) -> float:
    began = time.perf_counter()
    state = {name: tensor.bfloat16() for name, tensor in get_model_state_dict(model).items()}
    writer = HuggingFaceStorageWriter(
        str(output), dict.fromkeys(state, 1), save_distributed=True, enable_consolidation=True
    )
    dcp.save(state, storage_writer=writer)
    return time.perf_counter() - began


def _gather(model: nn.Module, output: Path) -> float:
    began = time.perf_counter()
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(output, state_dict={name: tensor.bfloat16() for name, tensor in full.items()})
    dist.barrier()
    return time.perf_counter() - began


def _cast(model: nn.Module) -> float:
    """The least that any staging can take."""
    local = [value.to_local() for value in get_model_state_dict(model).values() if isinstance(value, DTensor)]
    # ``zeros`` and not ``empty``: the pages are there before the clock runs.
    buffers = [torch.zeros(value.shape, dtype=torch.bfloat16) for value in local]
    began = time.perf_counter()
    for buffer, value in zip(buffers, local, strict=True):
        buffer.copy_(value)
    return time.perf_counter() - began


def _pwrite(model: nn.Module, output: Path) -> float:
    """The least that any writing can take: as many bytes, in one call, from memory that is warm."""
    nbytes = sum(value.to_local().numel() * 2 for value in get_model_state_dict(model).values())
    # A bytearray is written with zeros, so its pages are there before the clock runs.
    data = memoryview(bytearray(nbytes))
    output.mkdir(exist_ok=True)
    descriptor = os.open(output / "all", os.O_CREAT | os.O_WRONLY)
    dist.barrier()
    began = time.perf_counter()
    done, offset = 0, dist.get_rank() * nbytes
    while done < nbytes:
        done += os.pwrite(descriptor, data[done:], offset + done)
    os.close(descriptor)
    return time.perf_counter() - began


def _clean(folder: Path) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        for path in folder.iterdir():
            # "hf" itself stays: the hooks have checked once that they can write there.
            if path.name != "hf":
                shutil.rmtree(path)
        for path in (folder / "hf").iterdir():
            shutil.rmtree(path)
    dist.barrier()
