"""Runs of Lightning's own Trainer, on the ranks that call it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from shardsmith.hooks import every, last
from shardsmith.integrations.lightning import CheckpointHooks

BATCHES, DECAY = 4, 0.5
"""Batches an epoch."""


class Ranks(LightningEnvironment):
    """The ranks that are there already."""

    creates_processes_externally = True

    def world_size(self) -> int:
        return dist.get_world_size()

    def global_rank(self) -> int:
        return dist.get_rank()

    def local_rank(self) -> int:
        return dist.get_rank()


class KilledError(Exception):
    """What ends a run before its time."""


class Module(LightningModule):
    """Learns sums. Notes its weights after each step."""

    def __init__(self, *, sharded: bool, die_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.25), nn.Linear(8, 1))
        self.sharded = sharded
        self.die_at = die_at
        self.history: list[dict[str, Tensor]] = []

    def configure_model(self) -> None:
        if self.sharded:
            for layer in (self.net[0], self.net[2]):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.global_step == self.die_at:
            raise KilledError
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def on_train_start(self) -> None:
        self.start = whole(self.net)

    def on_train_batch_end(self, *_: Any) -> None:
        self.history.append(whole(self.net))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5), "interval": "step"}]


def whole(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for name, value in module.state_dict().items()
    }


def strategy_of(name: str) -> Any:
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if name == "auto":
        return name
    size = dist.get_world_size()
    return ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1, process_group_backend="gloo")


def run_fit(
    strategy: str, run: Path, epochs: int, out: str, die_at: int | None = None, accumulate: int = 1, **options: Any
) -> None:
    """Fit, and note on rank 0 what came of it in ``run/out``."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    torch.manual_seed(100 + dist.get_rank())
    data = torch.randn(BATCHES * 4, 6, generator=torch.Generator().manual_seed(3))
    module = Module(sharded=strategy == "fsdp2", die_at=die_at)
    asked: dict[str, Any] = {
        "save": every(3) | last(),
        "export": last(),
        "ema_decay": DECAY,
        "dtype": "float32",
        **options,
    }
    callback = CheckpointHooks(asked.pop("directory", run), **asked)
    trainer = Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy_of(strategy),
        plugins=[Ranks()] if dist.get_world_size() > 1 else None,
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(data, batch_size=4 // dist.get_world_size())
    with contextlib.suppress(KilledError):
        trainer.fit(module, loader)
    main, average = whole(module.net), {}
    if callback.ema is not None:
        with callback.ema.swapped_in():
            average = whole(module.net)
    if dist.get_rank() == 0:
        found = {"step": trainer.global_step, "epoch": trainer.current_epoch, "main": main, "ema": average}
        torch.save(
            {
                **found,
                "start": module.start,
                "history": module.history,
                "rate": trainer.optimizers[0].param_groups[0]["lr"],
            },
            run / out,
        )


def run_straight_and_broken(strategy: str, root: Path) -> None:
    """Three epochs at once, and in two runs, in processes that import Lightning once."""
    for name in ("straight", "broken"):
        (root / name).mkdir(exist_ok=True)
    run_fit(strategy, root / "straight", 3, "end.pt")
    run_fit(strategy, root / "broken", 2, "first.pt")
    run_fit(strategy, root / "broken", 3, "end.pt")


def run_killed_and_resumed(run: Path) -> None:
    """A run that dies in its second epoch, and the one that goes on."""
    run_fit("auto", run, 3, "first.pt", die_at=7)
    run_fit("auto", run, 3, "end.pt")
