"""Loops on Lightning's Fabric, on the ranks that call them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import Fabric
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from shardsmith.hooks import EMA, HFExport, Hooks, ShardedSave, every, last
from tests.integrations.lightning_runs import Ranks

DECAY = 0.5


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


def strategy_of(name: str) -> Any:
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if name == "fsdp2":
        size = dist.get_world_size()
        return ModelParallelStrategy(
            shard, data_parallel_size=size, tensor_parallel_size=1, process_group_backend="gloo"
        )
    return name


def train(strategy: str, run: Path, until: int) -> None:
    """Go on in ``run`` up to step ``until``, and note on rank 0 what came of it in ``run/end.pt``."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    plugins = [Ranks()] if dist.get_world_size() > 1 else None
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy_of(strategy), plugins=plugins)
    fabric.launch()
    torch.manual_seed(1)
    model = fabric.setup_module(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.25), nn.Linear(8, 1)))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=0.05))
    torch.manual_seed(100 + fabric.global_rank)
    ema = EMA(model, decay=DECAY)
    save = ShardedSave(run / "checkpoints", model=model, optimizer=optimizer, ema=ema, when=every(3) | last())
    export = HFExport(run / "hf", model=model, ema=ema, when=last(), dtype="float32")
    with Hooks(ema, save, export) as hooks:
        step = hooks.resume()
        while step < until:
            batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            fabric.backward((model(batch) - batch.sum(1, keepdim=True)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            hooks.step(step)
    with ema.swapped_in():
        average = whole(model)
    end = {"step": step, "main": whole(model), "ema": average}
    if fabric.global_rank == 0:
        torch.save(end, run / "end.pt")


def whole(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in module.state_dict().items()
    }


def train_straight_and_in_parts(strategy: str, folder: Path) -> None:
    train(strategy, folder / "straight", 8)
    for until in (5, 8):
        train(strategy, folder / "parts", until)
