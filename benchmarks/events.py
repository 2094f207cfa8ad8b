"""What hooks with and without listeners cost in a training step at which they have nothing to do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from shardsmith.hooks import HFExport, Hooks, ShardedSave, every, json_lines, metrics_to
from shardsmith.hooks.events import Listener

# So many that the clock's resolution and the loop itself count for nothing.
_STEPS = 20_000
_WORK_STEPS = 5
# A schedule that is asked in each step, and never says yes.
_NEVER = every(10**9)


def measure_events(console: Console, work: Path, runs: int) -> dict[str, Any]:
    """Print and return the CPU seconds of a step without work: of the hooks alone, and with listeners.

    Args:
        console: Where the table goes.
        work: An empty directory.
        runs: How often each is measured; the median counts.
    """
    listeners: dict[str, list[Listener]] = {
        "hooks, nobody listens": [],
        "hooks, a file and a tracker listen": [json_lines(work / "events.jsonl"), metrics_to(_track)],
    }
    training = statistics.median(_training_step() for _ in range(runs))
    found: dict[str, Any] = {"a training step": training}
    table = Table("a step without a save", "CPU, microseconds", "of the training step")
    table.add_row("the training step itself, on one core", f"{training * 1e6:.0f}", "")
    for name, heard in listeners.items():
        found[name] = statistics.median(_idle_step(work / f"{name} {run}", heard) for run in range(runs))
        table.add_row(name, f"{found[name] * 1e6:.2f}", f"{found[name] / training:.5%}")
    console.print(table)
    return found


def _track(numbers: dict[str, float], step: int) -> None:
    """A tracker that keeps nothing."""


def _idle_step(directory: Path, listeners: list[Listener]) -> float:
    model = nn.Linear(8, 8)
    save = ShardedSave(directory / "checkpoints", model=model, when=_NEVER)
    with Hooks(save, HFExport(directory / "hf", model=model, when=_NEVER), on_event=listeners) as hooks:
        hooks.resume()
        return _cpu_seconds(lambda count: [hooks.step(step) for step in range(1, count + 1)], _STEPS)


def _training_step() -> float:
    """Of a small model: 13 M parameters, 512 tokens."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(12)))
    optimizer, inputs = torch.optim.AdamW(model.parameters()), torch.randn(512, 1024)

    def train(count: int) -> None:
        for _ in range(count):
            model(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    # The first steps make the optimizer's moments.
    train(3)
    return _cpu_seconds(train, _WORK_STEPS)


def _cpu_seconds(body: Callable[[int], object], count: int) -> float:
    # Processor time: what else runs on the machine does not count.
    began = time.process_time()
    body(count)
    return (time.process_time() - began) / count
