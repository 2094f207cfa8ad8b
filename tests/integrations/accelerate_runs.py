"""A loop of one's own on accelerate, with our hooks attached, on real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardsmith.hooks import EMA, HFExport, Hooks, last
from tests.integrations.trainer_runs import (
    DECAY,
    make_data,
    make_model,
    pretend_to_have_an_accelerator,
    set_environment,
    whole,
)


def prepare(sharding: str) -> tuple[Any, nn.Module, Any, Any]:
    """Accelerator, model, optimizer and data, prepared."""
    if dist.is_initialized() and sharding != "none":
        set_environment()
    if sharding == "fsdp2":
        pretend_to_have_an_accelerator()
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    plugin = None
    if sharding == "fsdp2":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            state_dict_type="SHARDED_STATE_DICT",
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Qwen2DecoderLayer"],
            cpu_ram_efficient_loading=False,
        )
    accelerator = Accelerator(cpu=sharding != "fsdp2", fsdp_plugin=plugin, gradient_accumulation_steps=2)
    model = make_model("qwen2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(make_data(), batch_size=4 // accelerator.num_processes)
    return accelerator, *accelerator.prepare(model, optimizer, loader)


def run_loop(sharding: str, directory: Path, steps: int, load: str | None, name: str) -> None:
    """Train to ``steps``, saving after each second one, from a folder if one is given; keep what came out."""
    from shardsmith.integrations.accelerate import attach

    accelerator, model, optimizer, loader = prepare(sharding)
    ema = EMA(model, decay=DECAY)
    hooks = Hooks(ema, HFExport(directory / "hf", model=model, ema=ema, when=last(), dtype="float32"))
    attach(accelerator, hooks, prewarm=True)
    if load is not None:
        accelerator.load_state(str(directory / load))
    step = hooks.resume()
    history = [whole(model)]
    batches = list(loader)[2 * step :]
    while step < steps:
        for batch in (batches.pop(0), batches.pop(0)):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
        step += 1
        hooks.step(step)
        history.append(whole(model))
        if step % 2 == 0:
            accelerator.save_state(str(directory / f"state-{step}"))
    with ema.swapped_in():
        average = whole(model)
    hooks.close()
    truth = {"main": whole(model), "ema": average, "history": history, "step": step}
    if accelerator.is_main_process:
        torch.save(truth, directory / name)


def run_average_that_starts(directory: Path, is_new: bool) -> None:
    """A folder of a loop that kept no average, loaded by one that does."""
    from shardsmith.errors import CheckpointNotFoundError
    from shardsmith.integrations.accelerate import attach

    accelerator, model, *_ = prepare("ddp")
    ema = None if is_new else EMA(model, decay=DECAY)
    hooks = Hooks(*([ema] if ema else []))
    attached = attach(accelerator, hooks, on_missing="raise" if is_new else "start")
    if ema is None:
        hooks.step(hooks.resume() + 1)
        accelerator.save_state(str(directory / "state"))
        hooks.close()
        return
    with torch.no_grad():
        model.module.model.norm.weight.add_(1.0)
    accelerator.load_state(str(directory / "state"))
    assert hooks.resume() == 1
    assert torch.equal(ema.model_state_dict()["model.norm.weight"], model.module.model.norm.weight)
    attached.remove()
    attach(accelerator, Hooks(ema))
    with pytest.raises(CheckpointNotFoundError, match=r'"start".* attach\(\.\.\.\) of accelerate'):
        accelerator.load_state(str(directory / "state"))
    hooks.close()


def run_named_by_accelerate(directory: Path) -> None:
    """One process; accelerate names its folders and keeps two."""
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    from shardsmith.errors import UsageError
    from shardsmith.integrations.accelerate import attach, last_checkpoint

    project = ProjectConfiguration(str(directory), automatic_checkpoint_naming=True, total_limit=2)
    accelerator = Accelerator(cpu=True, project_config=project)
    with pytest.raises(UsageError, match="0 models were prepared"):
        attach(accelerator, Hooks())
    model = accelerator.prepare(nn.Linear(3, 2))
    ema = EMA(model, decay=DECAY)
    hooks = Hooks(ema)
    attached = attach(accelerator, hooks)
    hooks.resume()
    for step in range(1, 5):
        nn.init.constant_(model.weight, step)
        hooks.step(step)
        accelerator.save_state()
    attached.wait()
    newest = str(directory / "checkpoints" / "checkpoint_3")
    assert last_checkpoint(directory / "checkpoints", verify=True) == newest
    average = ema.model_state_dict()["weight"].clone()
    nn.init.zeros_(model.weight)
    ema.reset()
    accelerator.load_state()
    assert float(model.weight[0, 0]) == 4
    assert torch.equal(ema.model_state_dict()["weight"], average)
    attached.remove()
    accelerator.save_state()
    hooks.close()
    assert last_checkpoint(directory / "checkpoints") == newest
