"""A small real training run for the tests of saving: dropout, tied weights, buffers, a schedule, an average."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from shardsmith.hooks import EMA, HFExport, Hooks, Schedule, ShardedSave, every, last


class Tiny(nn.Module):
    """Sizes that no world size divides; the output embedding is the input embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.inner = nn.Sequential(nn.Linear(7, 13), nn.GELU(), nn.Dropout(0.2), nn.Linear(13, 7))
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen += tokens.numel()
        hidden = self.embed(tokens)
        return self.head(self.norm(hidden + self.inner(hidden)).clone())


def build(sharding: str) -> nn.Module:
    """The same weights on every rank, sharded in one of the ways that people use."""
    torch.manual_seed(5)
    model: nn.Module = Tiny()
    if sharding == "fsdp2":
        fully_shard(model.inner)
        fully_shard(model)
    elif sharding == "hsdp":
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
    elif sharding == "fsdp1":
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    elif sharding == "ddp":
        model = DistributedDataParallel(model)
    seed = 100 + (dist.get_rank() if dist.is_initialized() else 0)
    torch.manual_seed(seed)
    random.seed(seed)
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Return the fused one: DTensor works out the sharding of one operation, else of twelve for each shape, which was
    a third of the time of a rank."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def run_training(
    directory: Path,
    steps: int,
    *,
    sharding: str = "fsdp2",
    when: Schedule | None = None,
    kill_after: int | None = None,
    stop_after: int | None = None,
    export_to: Path | None = None,
    **options: Any,
) -> int:
    """Train up to ``steps``, from the last checkpoint if there is one; by default, save (and export) every five steps.

    Returns how many steps are done. ``stop_after``: then the last rank sends itself a SIGTERM.
    """
    model = build(sharding)
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=100)
    ema = EMA(model, decay=0.9, warmup=True)
    when = every(5) | last() if when is None else when
    save = ShardedSave(directory, model=model, optimizer=optimizer, scheduler=scheduler, ema=ema, when=when, **options)
    exports = [HFExport(export_to, model=model, ema=ema, when=when)] if export_to is not None else []
    hooks = Hooks(ema, save, *exports, stop_on=signal.SIGTERM)
    step = hooks.resume()
    while step < steps and not hooks.should_stop:
        tokens = torch.randint(11, (3, 4))
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        step += 1
        hooks.step(step)
        if step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == stop_after and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
    hooks.close()
    return step


def run_resave(source: Path, target: Path, sharding: str = "fsdp2") -> None:
    """Resume from one folder and save what was loaded to another, at the same step."""
    model = build(sharding)
    parts: dict[str, Any] = {"model": model, "optimizer": adamw(model)}
    parts["scheduler"] = torch.optim.lr_scheduler.OneCycleLR(parts["optimizer"], max_lr=1e-2, total_steps=100)
    parts["ema"] = EMA(model, decay=0.9, warmup=True)
    step = Hooks(parts["ema"], ShardedSave(source, when=last(), **parts)).resume()
    again = Hooks(parts["ema"], ShardedSave(target, when=every(step), **parts))
    again.hooks[1].on_step_end(step)
    again.close()
