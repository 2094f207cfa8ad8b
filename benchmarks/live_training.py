"""What the training notices of an export that is written in the background."""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.checkpoint import sharded_llama
from shardsmith.hooks import HFExport, at

# Steps of a quiet training; the first two warm up and do not count.
_QUIET_STEPS = 8
_TRAINED = 10_000_000
_TOKENS = torch.arange(64)[None]


def measure_alone(rank: int, folder: Path, parameters: int) -> dict[str, dict[str, float]]:  # noqa: ARG001
    """Pauses and steps with one rank, which has a core for its training and one for its writing."""
    export = HFExport(folder / "hf", model=sharded_llama(parameters), when=at(10**9))
    export.export(1)
    export.wait()
    found = {"pauses": _measure_pauses(export), "steps": measure_steps(export)}
    export.close()
    return found


def _measure_pauses(export: HFExport) -> dict[str, float]:
    """How long the main thread stands still while an export is written in the background."""
    export.export(2)
    ticks = [time.perf_counter()]
    while export.in_flight:
        time.sleep(0.001)
        # Asks for 1 ms; what it takes longer is time in which another thread held the interpreter's lock.
        ticks.append(time.perf_counter())
    export.wait()
    pauses = sorted(later - earlier - 0.001 for earlier, later in itertools.pairwise(ticks))
    return {"p99": pauses[int(len(pauses) * 0.99)], "max": pauses[-1], "ticks": len(pauses)}


def measure_steps(export: HFExport) -> dict[str, float]:
    """Median time of a training step, alone and while an export is written. All ranks.

    A small FSDP2 model trains (forward, backward, optimizer) on the ranks that export a large one, so that many steps
    fall into an export. On CPUs the writing takes its share of the same cores.
    """
    model = sharded_llama(_TRAINED)
    optimizer = torch.optim.AdamW(model.parameters())
    quiet = [_step(model, optimizer) for _ in range(_QUIET_STEPS)]
    busy = []
    # Numbers that no other part of this benchmark exports.
    for step in (10**6, 10**6 + 1):
        export.export(step)
        # All ranks ask: one that went on alone would wait in a collective of its step.
        while _any(export.in_flight > 0):
            busy.append(_step(model, optimizer))
        export.wait()
    return {"quiet": statistics.median(quiet[2:]), "busy": statistics.median(busy), "steps": len(busy)}


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    began = time.perf_counter()
    model(input_ids=_TOKENS).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - began


def _any(mine: bool) -> bool:
    """Whether it is so on any rank: all make the same steps."""
    found = torch.tensor(float(mine))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)
