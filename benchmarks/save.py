"""Saves and resumes of a run by real ranks: ``ShardedSave``, torch's own ways, and the limits.

A float32 Llama with AdamW and an average. A first, uncounted round makes the buffers; memory is read in it, too. Times
are of the slowest rank, processor time of all ranks together; the medians of the other rounds.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Peak, anonymous_bytes, cpu_seconds_of
from benchmarks.rank_processes import spawn_ranks
from benchmarks.save_contenders import SavedRun
from benchmarks.save_pauses import measure_pauses
from benchmarks.timeline import Event, draw, recorded

WRITE = "a limit: pwrite + fsync of the same bytes"
COPY = "a limit: a bare copy of the shards, into memory that is there"
TORCH = "dcp.save"
TORCH_ASYNC = "dcp.async_save, in a thread"
TORCH_PROCESS = "dcp.async_save, in a process"
OURS = "shardsmith ShardedSave"
OVERLAP = 'shardsmith ShardedSave(staging="overlap"), with the next step of the training'
TORCH_LOAD = "dcp.load"
RESUME = "shardsmith ShardedSave.resume, verified"


def compare_saves(
    console: Console,
    work: Path,
    parameters: int,
    ranks: int,
    runs: int,
    *,
    small_tensors: int | None = None,
    timeline: Path | None = None,
) -> dict[str, Any]:
    """Save and load with each contender in turn, print the tables; the figures.

    Args:
        console: Where to print.
        work: A directory for all that is saved.
        parameters: Size of the Llama.
        ranks: Number of ranks that hold it.
        runs: Rounds that count.
        small_tensors: Instead of the Llama a model of about so many parameters of 1,000 elements.
        timeline: Where to draw what happens in the last save of ours.
    """
    size = f"a Llama of about {parameters / 1e6:.0f} M parameters"
    if small_tensors:
        size = f"{small_tensors} parameters of 1,000 elements"
    size += " with AdamW and an average"
    console.print(f"saving and resuming {size} on {ranks} ranks in {work}")
    found: dict[str, Any] = spawn_ranks(_bench, ranks, work / "ranks", parameters, runs, small_tensors)
    events, shard_bytes, pauses = found.pop("events"), found.pop("shard_bytes"), found.pop("pauses")
    table = Table("way", "seconds", "times ours", "training waits", "processor seconds", "extra memory of a rank")
    for name, figures in found.items():
        # Each way against ours of its kind: loads against loads, overlapped saves against overlapped ones.
        ours = found[RESUME if name in (TORCH_LOAD, RESUME) else OVERLAP if name == OVERLAP else OURS]
        table.add_row(
            name,
            f"{figures['seconds']:.2f}",
            f"{figures['seconds'] / ours['seconds']:.1f}x",
            f"{figures['stall']:.2f}",
            f"{figures['cpu_seconds']:.1f}",
            # in a process of its own, and in memory that it shares with that
            "not measured" if name == TORCH_PROCESS else f"{figures['extra_bytes'] / 1e6:.0f} MB",
        )
    console.print(table)
    console.print(_aims(found, shard_bytes))
    console.print(_noticed(pauses))
    if timeline is not None:
        title = f"One save: {size}, {ranks} ranks, {os.cpu_count()} cores"
        timeline.write_text(draw([Event(*event) for event in events], found[OURS]["stall"], title))
    return {**found, "pauses": pauses}


def _noticed(pauses: dict[str, dict[str, float]]) -> Table:
    """What the thread that trains notices while a save is written."""
    table = Table("while this is written", "a step, median", "times a quiet one", "p99", "pause, p99")
    for name, figures in pauses.items():
        table.add_row(
            name,
            f"{figures['median'] * 1e3:.1f} ms",
            f"{figures['median'] / pauses['nothing']['median']:.2f}x",
            f"{figures['p99'] * 1e3:.1f} ms",
            f"{figures['pause'] * 1e3:.1f} ms",
        )
    return table


def _aims(found: dict[str, Any], shard_bytes: int) -> Table:
    """What we want to reach, and what this run reached."""
    ours, torchs, resume, load = found[OURS], found[TORCH], found[RESUME], found[TORCH_LOAD]
    rows = [
        ("a save in all, times pwrite + fsync", ours["seconds"] / found[WRITE]["seconds"], 2.5),
        ("a save in all, times dcp.save", ours["seconds"] / torchs["seconds"], 0.5),
        ("its processor seconds, times dcp.save", ours["cpu_seconds"] / torchs["cpu_seconds"], 0.6),
        ("the training waits, times a bare copy", ours["stall"] / found[COPY]["stall"], 1.2),
        ("the training waits with overlap, times a bare copy", found[OVERLAP]["stall"] / found[COPY]["stall"], 1.2),
        ("a resume, times dcp.load", resume["seconds"] / load["seconds"], 1.0),
        ("its processor seconds, times dcp.load", resume["cpu_seconds"] / load["cpu_seconds"], 1.0),
        ("extra memory of a save, times the shard", ours["extra_bytes"] / shard_bytes, 1.1),
    ]
    table = Table("aim", "at most", "found")
    for name, figure, aim in rows:
        table.add_row(name, f"{aim:.1f}", f"{figure:.2f}", style=None if figure <= aim else "bold")
    return table


def _bench(rank: int, folder: Path, parameters: int, runs: int, small_tensors: int | None) -> dict[str, Any]:
    run = SavedRun(folder, parameters, small_tensors)
    events: list[Event] = []
    found: dict[str, list[dict[str, float]]] = {}
    # Does not work with this torch, on any rank: left out from then on.
    broken: set[str] = set()
    for step in range(1, runs + 2):
        contenders: dict[str, Callable[[int], float]] = {
            WRITE: run.write,
            COPY: run.copy,
            TORCH: run.save_by_torch,
            TORCH_LOAD: run.load_by_torch,
            TORCH_ASYNC: run.save_by_torch_async,
            TORCH_PROCESS: run.save_by_torch_in_process,
            OURS: run.save,
            RESUME: run.resume,
            OVERLAP: run.save_overlapped,
        }
        for name, body in contenders.items():
            if name in broken:
                continue
            with recorded(rank) as seen:
                # The events of the last round are drawn.
                try:
                    figures = measure(body, step)
                except KeyError:  # in the stager of torch 2.11 and 2.12, on all ranks
                    if name not in (TORCH_ASYNC, TORCH_PROCESS):
                        raise
                    broken.add(name)
                    found.pop(name, None)
                    _say(f"{name}: does not work with torch {torch.__version__}")
                    continue
            if name == OURS:
                events = seen
            if name not in (TORCH, OURS):  # those are loaded next; more than one at a time would take too much room
                run.remove_files()
            if rank == 0:
                found.setdefault(name, []).append(figures)
                _say(f"round {step} of {runs + 1}, {name}: {figures['seconds']:.2f} s")
    pauses = {
        name: measure_pauses(begin, runs + 2, run.remove_files)
        for name, begin in {"nothing": None, TORCH_ASYNC: run.begin_by_torch, OURS: run.begin}.items()
        if name not in broken
    }
    run.close()
    everywhere: list[list[Event]] = [[] for _ in range(dist.get_world_size())]
    # The events of all ranks, which one clock orders.
    dist.all_gather_object(everywhere, events)
    summary: dict[str, Any] = {
        name: {what: statistics.median(figures[what] for figures in rounds[1:]) for what in rounds[0]}
        | {"extra_bytes": max(figures["extra_bytes"] for figures in rounds)}
        for name, rounds in found.items()
    }
    summary["events"] = [[e.lane, e.phase, e.begin, e.end] for one in everywhere for e in one]
    return summary | {"shard_bytes": run.shard_bytes, "pauses": pauses}


def _say(line: str) -> None:
    """Print at once how far it is: all rounds together take minutes."""
    print(line, flush=True)


def measure(body: Callable[[int], float], step: int) -> dict[str, float]:
    """All ranks run ``body``; the slowest and the largest count, of processor time the sum."""
    dist.barrier()
    before, cpu, began = anonymous_bytes("self"), _cpu_seconds(), time.perf_counter()
    with Peak() as peak:
        stall = body(step)
        dist.barrier()
    worst = torch.tensor([time.perf_counter() - began, stall, float(peak.bytes - before)], dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    total = torch.tensor(_cpu_seconds() - cpu, dtype=torch.float64)
    dist.all_reduce(total)
    figures = dict(zip(("seconds", "stall", "extra_bytes"), worst.tolist(), strict=True))
    return {**figures, "cpu_seconds": total.item()}


def _cpu_seconds() -> float:
    """Of this process, and of those that it has started and that still run."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime + sum(cpu_seconds_of(one.pid) for one in multiprocessing.active_children())


def room_needed(parameters: int, ranks: int) -> tuple[float, float]:
    """Return what the section takes at its peak, in bytes: of disk, and of memory."""
    # 4 floats of 4 bytes for each parameter.
    state = 16 * parameters  # weights, two moments and the average in float32
    # the state, and five copies that stay: for the limits, of torch's stager, of two hooks; the weights gathered
    return 1.1 * state, 5.5 * state + 4 * parameters * ranks + 0.4e9 * ranks
