"""TorchTitan's saves by its own checkpoint manager, and by the one that ``engine`` makes. Imports TorchTitan.

python -m benchmarks.titan_saves PARAMETERS SHARDS RUNS DIRECTORY RESULT, in an environment with TorchTitan 0.3
"""

from __future__ import annotations

import json
import logging
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from benchmarks.checkpoint import sharded_llama
from benchmarks.rank_processes import spawn_ranks
from benchmarks.save import measure
from shardsmith.integrations.torchtitan.manager_0_3 import HookedCheckpointManager
from shardsmith.integrations.torchtitan.options import CheckpointHooks

# What this compares is the writing alone.
_HOOKS = CheckpointHooks(engine=True, prove_load=False, save_on_sigterm=False)
WAYS: dict[str, dict[str, Any]] = {
    "TorchTitan": {"async_mode": "disabled"},
    "with engine": {"async_mode": "disabled", "hooks": _HOOKS},
    "TorchTitan, async": {"async_mode": "async"},
    "with engine, async": {"async_mode": "async", "hooks": _HOOKS},
}


class _Counter:
    """What a trainer is for its manager: something that knows the step."""

    step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": torch.tensor(self.step, dtype=torch.int32)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = int(state_dict["step"])


def _bench(rank: int, folder: Path, parameters: int, runs: int) -> dict[str, Any]:
    # TorchTitan logs each save, at the price of its time.
    logging.disable()
    model = sharded_llama(parameters)
    group = ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-4})
    optimizers = OptimizersContainer(OptimizersContainer.Config(param_groups=[group]), model_parts=[model])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step()
    optimizers.zero_grad()
    counter = _Counter()
    managers = {
        name: _manager(folder / name.replace(" ", "-"), options, model, optimizers, counter)
        for name, options in WAYS.items()
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    # The trainer's step and the round are one number, which the manager saves, too.
    for counter.step in range(1, runs + 2):
        for name, manager in managers.items():

            def save(step: int, manager: Any = manager) -> float:
                began = time.perf_counter()
                manager.save(step)
                waited = time.perf_counter() - began
                manager.maybe_wait_for_saving()
                return waited

            figures = measure(save, counter.step)
            if rank == 0:
                found[name].append(figures)
                print(f"round {counter.step} of {runs + 1}, {name}: {figures['seconds']:.2f} s", flush=True)
                # All steps of this way: the next begins with an empty folder.
                shutil.rmtree(manager.folder)
                Path(manager.folder).mkdir()
            dist.barrier()
    for manager in managers.values():
        manager.close()
    return {
        name: {what: statistics.median(each[what] for each in rounds[1:]) for what in rounds[0]}
        for name, rounds in found.items()
        if rounds
    }


def _manager(folder: Path, options: dict[str, Any], model: Any, optimizers: Any, counter: _Counter) -> Any:
    kind = HookedCheckpointManager if "hooks" in options else CheckpointManager
    config = kind.Config(enable=True, folder="checkpoint", interval=1, keep_latest_k=0, **options)
    return kind(
        config,
        dataloader=None,
        model_parts=[model],
        optimizers=optimizers,
        lr_schedulers=None,
        states={"train_state": counter},
        sd_adapter=None,
        base_folder=str(folder),
    )


if __name__ == "__main__":
    parameters, shards, runs = map(int, sys.argv[1:4])
    figures = spawn_ranks(_bench, shards, Path(sys.argv[4]) / "titan", parameters, runs)
    Path(sys.argv[5]).write_text(json.dumps(figures))
