"""Runs of a small model like BAGEL's that are saved and loaded by a ShardedCheckpointManager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

from examples.bagel.model import Sizes, average_of, build
from shardsmith import ShardedCheckpointManager
from shardsmith.run_state.fsdp1_hybrid import hybrid_groups_have_a_source
from tests.legacy_layouts import SIZES, train_step, update_by_position, wrap

WHOLE = StateDictOptions(full_state_dict=True)


class Run:
    """Model, average, optimizer and scheduler under one sharding, and their manager."""

    def __init__(self, directory: Path, sharding: str, *, seed: int = 3, sizes: Sizes = SIZES, **options: Any) -> None:
        torch.manual_seed(seed)
        whole = build(sizes)
        copy = average_of(whole)
        self.sharding = sharding
        self.model, self.average = wrap(whole, sharding), wrap(copy, sharding)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=1e-2, total_steps=50)
        self.manager = ShardedCheckpointManager(
            directory,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            ema=self.average,
            ema_decay=options.pop("ema_decay", 0.9),
            timeout_secs=30,
            **options,
        )

    def train(self, begin: int, end: int) -> None:
        for step in range(begin, end):
            train_step(self.model, self.optimizer, step)
            self.scheduler.step()
            if self.sharding == "fsdp2":
                update_by_name(self.average, self.model)
            else:
                update_by_position(self.average, self.model)
            assert self.manager.average is not None
            self.manager.average.updates += 1

    def states(self) -> dict[str, dict[str, Tensor]]:
        """Whole tensors of everything, by part."""
        options = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True)
        with hybrid_groups_have_a_source(self.model):
            optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        return {
            "main": clone(get_model_state_dict(self.model, options=WHOLE)),
            "ema": clone(get_model_state_dict(self.average, options=WHOLE)),
            "optimizer": clone({n: v for n, v in optimizer.items() if isinstance(v, Tensor)}),
            "facts": {
                "lr": torch.tensor(self.scheduler.get_last_lr(), dtype=torch.float64),
                "updates": torch.tensor(self.manager.average.updates if self.manager.average else -1),
                "random": torch.rand(3),
            },
        }


def clone(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


@torch.no_grad()
def update_by_name(average: nn.Module, model: nn.Module) -> None:
    current = dict(model.named_parameters())
    for name, parameter in average.named_parameters():
        if current[name].requires_grad:
            parameter.to_local().lerp_(current[name].to_local(), 0.1)


def status_of(rank: int, step: int) -> dict[str, Any]:
    return {"t2i": {0: [rank, step, 1], 1: (2, 3)}, "name": "packed"}


def run_steps(
    directory: Path, sharding: str, begin: int, end: int, result: Path | None, options: dict[str, Any]
) -> None:
    """Train from ``begin``, loading it if it is not 0, up to ``end``; save there, or keep the whole states."""
    run = Run(directory, sharding, seed=3 if begin == 0 else 99, **options)
    if begin:
        loaded = run.manager.load_sharded_checkpoint()
        assert loaded.step == begin
        assert loaded.data_status == status_of(dist.get_rank(), begin)
    run.train(begin, end)
    if result is None:
        run.manager.save_sharded_checkpoint(end, data_status=status_of(dist.get_rank(), end))
    else:
        states = run.states()
        if dist.get_rank() == 0:
            torch.save(states, result)
