"""Steps that are to be resumed from and loaded by others: a save with an export beside it, against one write.

A float32 Llama with AdamW and an average. A first, uncounted round makes the buffers. Times are of the slowest rank,
processor time of all ranks together; the medians of the other rounds.
"""

from __future__ import annotations

import resource
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.checkpoint import sharded_llama
from benchmarks.rank_processes import spawn_ranks
from shardsmith.hooks import EMA, HFExport, Hooks, ShardedSave, at, every

_NEVER = at(10**9)
SAVE = "ShardedSave alone"
BOTH = "ShardedSave, and HFExport of weights and average beside it"
SHARED = "the same at one step of Hooks: the export reads the copy of the save"
ONE = 'ShardedSave(weights="huggingface")'
RESUME = "resume of ShardedSave alone, verified"
RESUME_ONE = "resume of one write, verified"


def compare_one_write(console: Console, work: Path, parameters: int, ranks: int, runs: int) -> dict[str, Any]:
    """Save in each way in turn, print the table; the figures.

    Args:
        console: Where to print.
        work: A directory for all that is saved.
        parameters: Size of the Llama.
        ranks: Number of ranks that hold it.
        runs: Rounds that count.
    """
    console.print(f"one write of a Llama of about {parameters / 1e6:.0f} M parameters on {ranks} ranks in {work}")
    found: dict[str, Any] = spawn_ranks(_bench, ranks, work / "one-write", parameters, runs)
    table = Table("way", "seconds", "times one write", "training waits", "processor seconds", "bytes on disk")
    for name, figures in found.items():
        ours = found[RESUME_ONE if name.startswith("resume") else ONE]
        table.add_row(
            name,
            f"{figures['seconds']:.2f}",
            f"{figures['seconds'] / ours['seconds']:.1f}x",
            f"{figures['stall']:.2f}",
            f"{figures['cpu_seconds']:.1f}",
            f"{figures['nbytes'] / 1e6:.0f} MB",
        )
    console.print(table)
    return found


def _bench(rank: int, folder: Path, parameters: int, runs: int) -> dict[str, Any]:  # noqa: ARG001
    model = sharded_llama(parameters)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    # A step with zero gradients makes the moments and changes no weight but by the decay.
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    ema = EMA(model)
    ema.update()
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "ema": ema}
    save = ShardedSave(folder / "save", when=every(1), **state)
    one = ShardedSave(folder / "one", when=_NEVER, weights="huggingface", **state)
    export = HFExport(folder / "export", model=model, ema=ema, when=every(1), dtype="original", ema_as="directory")
    hooks = Hooks(save, export)

    def save_one(hook: ShardedSave, step: int) -> float:
        began = time.perf_counter()
        hook.save(step)
        stall = time.perf_counter() - began
        hook.saving(step).result()
        return stall

    def save_and_export(step: int) -> None:
        save.step_copies = None
        save.save(step)
        export.export(step)

    def save_and_share(step: int) -> None:
        save.step_copies = export.step_copies
        hooks.step(step)

    def save_both(act: Callable[[int], None], step: int) -> float:
        began = time.perf_counter()
        act(step)
        stall = time.perf_counter() - began
        save.saving(step).result()
        export.wait()
        return stall

    def resume(hook: ShardedSave, step: int) -> float:
        assert hook.resume() == step
        return 0.0

    ways: dict[str, Callable[[int], float]] = {
        SAVE: lambda step: save_one(save, step),
        RESUME: lambda step: resume(save, step),
        BOTH: lambda step: save_both(save_and_export, step),
        SHARED: lambda step: save_both(save_and_share, step),
        ONE: lambda step: save_one(one, step),
        RESUME_ONE: lambda step: resume(one, step),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    # One more than the runs: the first round makes buffers.
    for step in range(1, runs + 2):
        for name, body in ways.items():
            found[name].append(_measure(body, step, folder))
            # What was saved is resumed from before it is removed.
            if name in (RESUME, BOTH, SHARED, RESUME_ONE):
                _remove_files(folder)
    one.close()
    hooks.close(broken_off=True)
    return {
        name: {what: statistics.median(figures[what] for figures in rounds[1:]) for what in rounds[0]}
        for name, rounds in found.items()
    }


def _measure(body: Callable[[int], float], step: int, folder: Path) -> dict[str, float]:
    """All ranks run ``body``; the slowest, and of processor time the sum."""
    dist.barrier()
    cpu, began = _cpu_seconds(), time.perf_counter()
    stall = body(step)
    dist.barrier()
    worst = torch.tensor([time.perf_counter() - began, stall], dtype=torch.float64)
    # Seconds of the slowest rank, processor seconds of all: the ranks share the machine's cores.
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    total = torch.tensor(_cpu_seconds() - cpu, dtype=torch.float64)
    dist.all_reduce(total)
    nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    dist.barrier()
    return {"seconds": worst[0].item(), "stall": worst[1].item(), "cpu_seconds": total.item(), "nbytes": nbytes}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _remove_files(folder: Path) -> None:
    """Remove the steps. All ranks; communicates."""
    dist.barrier()
    if dist.get_rank() == 0:
        for path in folder.glob("*/*"):
            shutil.rmtree(path)
    dist.barrier()
