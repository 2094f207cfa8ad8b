"""Saves and resumes of a run by real ranks: ``ShardedSave``, torch's own ways, and the limits.

A float32 Llama with AdamW and an average. A first, uncounted round makes the buffers; memory is read in it, too. Times
are of the slowest rank, processor time of all ranks together; the medians of the other rounds.
"""

from __future__ import annotations

import os
import resource
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
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from benchmarks.checkpoint import sharded_llama
from benchmarks.measure import Peak, anonymous_bytes
from benchmarks.rank_processes import spawn_ranks
from benchmarks.timeline import Event, draw, recorded
from shardsmith.hooks import EMA, ShardedSave, at
from shardsmith.sharding.local_boxes import local_boxes

WRITE = "a limit: pwrite + fsync of the same bytes"
COPY = "a limit: a bare copy of the shards, into memory that is there"
TORCH = "dcp.save"
TORCH_ASYNC = "dcp.async_save, in a thread"
OURS = "shardsmith ShardedSave"
OVERLAP = 'shardsmith ShardedSave(staging="overlap"), with the next step of the training'
TORCH_LOAD = "dcp.load"
RESUME = "shardsmith ShardedSave.resume, verified"
_NEVER = at(10**9)


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
    events, shard_bytes = found.pop("events"), found.pop("shard_bytes")
    table = Table("way", "seconds", "times ours", "training waits", "processor seconds", "extra memory of a rank")
    for name, figures in found.items():
        ours = found[RESUME if name in (TORCH_LOAD, RESUME) else OVERLAP if name == OVERLAP else OURS]
        table.add_row(
            name,
            f"{figures['seconds']:.2f}",
            f"{figures['seconds'] / ours['seconds']:.1f}x",
            f"{figures['stall']:.2f}",
            f"{figures['cpu_seconds']:.1f}",
            f"{figures['extra_bytes'] / 1e6:.0f} MB",
        )
    console.print(table)
    console.print(_aims(found, shard_bytes))
    if timeline is not None:
        title = f"One save: {size}, {ranks} ranks, {os.cpu_count()} cores"
        timeline.write_text(draw([Event(*event) for event in events], found[OURS]["stall"], title))
    return found


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
    run = _Run(folder, parameters, small_tensors)
    events: list[Event] = []
    found: dict[str, list[dict[str, float]]] = {}
    for step in range(1, runs + 2):
        contenders: dict[str, Callable[[int], float]] = {
            WRITE: run.write,
            COPY: run.copy,
            TORCH: run.save_by_torch,
            TORCH_ASYNC: run.save_by_torch_async,
            OURS: run.save,
            OVERLAP: run.save_overlapped,
            TORCH_LOAD: run.load_by_torch,
            RESUME: run.resume,
        }
        for name, body in contenders.items():
            with recorded(rank) as seen:
                figures = _measure(body, step)
            if name == OURS:
                events = seen
            if rank == 0:
                found.setdefault(name, []).append(figures)
        _clean(folder)
    run.close()
    everywhere: list[list[Event]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, events)
    summary: dict[str, Any] = {
        name: {what: statistics.median(figures[what] for figures in rounds[1:]) for what in rounds[0]}
        | {"extra_bytes": max(figures["extra_bytes"] for figures in rounds)}
        for name, rounds in found.items()
    }
    summary["events"] = [[e.lane, e.phase, e.begin, e.end] for one in everywhere for e in one]
    return summary | {"shard_bytes": run.shard_bytes}


class _Run:
    """A run that could go on training, and the ways to save it. Each returns how long the training waits."""

    def __init__(self, folder: Path, parameters: int, small_tensors: int | None = None) -> None:
        self._folder = folder
        self._model = _small_model(small_tensors) if small_tensors else sharded_llama(parameters)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4)
        for parameter in self._model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._ema = EMA(self._model)
        self._hook = ShardedSave(
            folder / "ours", model=self._model, optimizer=self._optimizer, ema=self._ema, when=_NEVER
        )
        self._step_began = self._step_waited = 0.0
        self._optimizer.register_step_pre_hook(self._note_begin)
        self._overlapping = ShardedSave(
            folder / "overlap",
            model=self._model,
            optimizer=self._optimizer,
            ema=self._ema,
            when=_NEVER,
            staging="overlap",
        )
        self._optimizer.register_step_pre_hook(self._note_wait)
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._group = dist.new_group(backend="gloo")
        tensors = [value for part in self._state().values() for value in part.values() if isinstance(value, Tensor)]
        self._shards = [held for tensor in tensors for _, held in local_boxes(tensor)]
        self._buffers = [torch.zeros_like(shard) for shard in self._shards]
        self.shard_bytes = sum(shard.nbytes for shard in self._shards)
        self._bytes = memoryview(bytearray(self.shard_bytes))

    def write(self, step: int) -> float:
        began, done = time.perf_counter(), 0
        descriptor = os.open(self._folder / f"limit-{step}-{dist.get_rank()}", os.O_CREAT | os.O_WRONLY)
        while done < len(self._bytes):
            done += os.pwrite(descriptor, self._bytes[done:], done)
        os.fsync(descriptor)
        os.close(descriptor)
        return time.perf_counter() - began

    def copy(self, step: int) -> float:  # noqa: ARG002
        began = time.perf_counter()
        for buffer, shard in zip(self._buffers, self._shards, strict=True):
            buffer.copy_(shard)
        return time.perf_counter() - began

    def save_by_torch(self, step: int) -> float:
        began = time.perf_counter()
        dcp.save(self._state(), checkpoint_id=self._folder / f"torch-{step}", process_group=self._group)
        return time.perf_counter() - began

    def save_by_torch_async(self, step: int) -> float:
        began = time.perf_counter()
        future: Any = dcp.async_save(
            self._state(),
            checkpoint_id=self._folder / f"async-{step}",
            process_group=self._group,
            async_stager=self._stager,
        )
        stall = time.perf_counter() - began
        future.result()
        return stall

    def save(self, step: int) -> float:
        began = time.perf_counter()
        self._hook.save(step)
        stall = time.perf_counter() - began
        self._hook.saving(step).result()
        return stall

    def save_overlapped(self, step: int) -> float:
        """With a forward, a backward and a step of the optimizer, which waits for what is not copied by then."""
        began = time.perf_counter()
        self._overlapping.save(step)
        stall = time.perf_counter() - began
        if hasattr(self._model, "config"):
            self._model(torch.randint(1000, (1, 64))).logits.sum().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._overlapping.saving(step).result()
        return stall + self._step_waited

    def _note_begin(self, *_: Any) -> None:
        self._step_began = time.perf_counter()

    def _note_wait(self, *_: Any) -> None:
        self._step_waited = time.perf_counter() - self._step_began

    def load_by_torch(self, step: int) -> float:
        began = time.perf_counter()
        dcp.load(self._state(), checkpoint_id=self._folder / f"torch-{step}", process_group=self._group)
        return time.perf_counter() - began

    def resume(self, step: int) -> float:
        began = time.perf_counter()
        assert self._hook.resume() == step
        return time.perf_counter() - began

    def close(self) -> None:
        self._hook.close()
        self._overlapping.close()

    def _state(self) -> dict[str, Any]:
        options = StateDictOptions(flatten_optimizer_state_dict=True)  # as a checkpoint of ours has it
        return {
            "model": get_model_state_dict(self._model),
            "optimizer": get_optimizer_state_dict(self._model, self._optimizer, options=options),
            "ema_model": self._ema.model_state_dict(),
        }


def _small_model(tensors: int) -> nn.Module:
    model = nn.ParameterList(nn.Parameter(torch.randn(1000)) for _ in range(tensors))
    fully_shard(model)
    return model


def _measure(body: Callable[[int], float], step: int) -> dict[str, float]:
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
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _clean(folder: Path) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        for path in [*folder.iterdir(), *(folder / "ours").iterdir(), *(folder / "overlap").iterdir()]:
            if path.is_file():
                path.unlink()
            elif path.name not in ("ours", "overlap"):
                shutil.rmtree(path)
    dist.barrier()
