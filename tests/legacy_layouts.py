"""Checkpoints as other projects write them, by code of our own that uses next to none of the package.

One small model like BAGEL's is trained by real ranks, with an average in a second module that has an FSDP wrap of its
own and is updated by position, as BAGEL does it; then it is saved in every layout that is around.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardedStateDictConfig,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp._traversal_utils import _get_fsdp_handles
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from examples.bagel.model import WRAPPED, Bagel, Sizes, average_of, build
from shardsmith.run_state.fsdp1_hybrid import hybrid_groups_have_a_source

STEP = 6
SIZES = Sizes()
WORLD = 4


def wrap(model: nn.Module, sharding: str) -> nn.Module:
    """``fsdp1``: BAGEL's FULL_SHARD. ``hybrid``: its HYBRID_SHARD, 2 x 2. ``fsdp2``: fully_shard. ``none``."""
    if sharding == "none":
        return model
    if sharding == "fsdp2":
        for module in reversed(list(model.modules())):  # inner ones first
            if type(module) in WRAPPED:
                fully_shard(module)
        fully_shard(model)
        return model
    options: dict[str, Any] = {}
    if sharding == "hybrid":
        shape = (2, dist.get_world_size() // 2)
        options["device_mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        options["sharding_strategy"] = ShardingStrategy.HYBRID_SHARD
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=WRAPPED)
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **options)


def inputs(step: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, patches, latents and times of one packed sequence."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(SIZES.vocab, (7,), generator=generator)
    patches = torch.randn(5, 3 * SIZES.patch**2, generator=generator)
    latents = torch.randn(6, SIZES.latent_dim, generator=generator)
    return tokens, patches, latents, torch.rand(6, generator=generator)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Cross-entropy on the text, mean squares on the velocities."""
    tokens, patches, latents, time = inputs(step)
    logits, velocity = model(tokens, patches, latents, time)
    loss = nn.functional.cross_entropy(logits[:-1], tokens[1:]) + (velocity - latents).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def update_by_position(average: nn.Module, model: nn.Module, decay: float = 0.9) -> None:
    """BAGEL's update: handle by handle, leaving out what is frozen."""
    for old, new in zip(_get_fsdp_handles(average), _get_fsdp_handles(model), strict=True):
        if new.flat_param.requires_grad:
            old.flat_param.data.mul_(decay).add_(new.flat_param.data, alpha=1 - decay)


def trained(sharding: str, steps: int = STEP) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """Model, average and optimizer after some steps; the average only under FSDP1."""
    torch.manual_seed(3)
    whole = build(SIZES)
    copy = average_of(whole)
    model, average = wrap(whole, sharding), wrap(copy, sharding)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        train_step(model, optimizer, step)
        if sharding != "fsdp2":
            update_by_position(average, model)
    return model, average, optimizer


def run_writers(directory: Path) -> None:
    """Write every layout, and the truth beside them. All ranks."""
    for sharding in ("fsdp1", "hybrid"):
        folder = directory / sharding
        model, average, optimizer = trained(sharding)
        models = {"model": model, "ema": average}
        for writer in (write_fork, write_fork_without_dcp, write_bagel, write_accelerate):
            make(folder / writer.__name__)
            writer(folder / writer.__name__, models, optimizer)
        keep_truth(folder, {name: full_state(module) for name, module in models.items()})
        with hybrid_groups_have_a_source(model):
            options = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True)
            whole_optimizer = get_optimizer_state_dict(model, optimizer, options=options)
        if dist.get_rank() == 0:
            torch.save(whole_optimizer, folder / "optimizer-truth.pt")
    model, _, optimizer = trained("fsdp2")
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_model_state_dict(model)
    beside = {
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        "train_state": {"step": torch.tensor(STEP)},
    }
    dcp.save({**state, **beside}, checkpoint_id=directory / "fsdp2" / "titan" / f"step-{STEP}")
    dcp.save({"model": state, **beside}, checkpoint_id=directory / "fsdp2" / "flame" / f"step-{STEP}")
    make(directory / "fsdp2" / "rank_files")
    write_manifest(directory / "fsdp2" / "rank_files", has_ema=False, has_scheduler=False, has_data_status=False)
    torch.save(
        {"model": model.state_dict()}, directory / "fsdp2" / "rank_files" / f"model_rank{dist.get_rank():05d}.pt"
    )
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    keep_truth(directory / "fsdp2", {"model": whole})


def write_fork(directory: Path, models: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """The sharded fork of BAGEL, through torch.distributed.checkpoint."""
    write_manifest(directory)
    for name, module in models.items():
        dcp.save(sharded_state(module), checkpoint_id=directory / f"{name}_sharded")
    with hybrid_groups_have_a_source(models["model"]):
        named = get_optimizer_state_dict(models["model"], optimizer)
    write_fork_rest(directory, named)


def write_fork_without_dcp(directory: Path, models: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """The same where torch.distributed.checkpoint is not to be had."""
    write_manifest(directory)
    for name, module in models.items():
        torch.save(sharded_state(module), directory / f"{name}_rank{dist.get_rank():05d}.pt")
    write_fork_rest(directory, optimizer.state_dict())


def write_fork_rest(directory: Path, optimizer: dict[str, Any]) -> None:
    torch.save(optimizer, directory / f"optimizer_rank{dist.get_rank():05d}.pt")
    if dist.get_rank() == 0:
        torch.save({"last_epoch": STEP}, directory / "scheduler.pt")
        torch.save(data_status(), directory / "data_status.pt")
    dist.barrier()


def write_manifest(directory: Path, **changes: bool) -> None:
    facts = {"train_steps": STEP, "world_size": dist.get_world_size(), "checkpoint_type": "sharded"}
    promises = {"has_ema": True, "has_scheduler": True, "has_data_status": True} | changes
    if dist.get_rank() == 0:
        (directory / "metadata.json").write_text(json.dumps(facts | promises))


def write_bagel(directory: Path, models: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """BAGEL itself: whole weights, gathered on rank 0; of the optimizer each shard's part."""
    for name, module in reversed(models.items()):
        state = full_state(module)
        if dist.get_rank() == 0:
            save_file(state, directory / f"{name}.safetensors")
    hybrid = directory.parent.name == "hybrid"
    shards = dist.get_world_size() // 2 if hybrid else dist.get_world_size()
    if dist.get_rank() < shards:
        torch.save(optimizer.state_dict(), directory / f"optimizer.{dist.get_rank():05d}-of-{shards:05d}.pt")
    if dist.get_rank() == 0:
        torch.save({"last_epoch": STEP}, directory / "scheduler.pt")
        torch.save(data_status(), directory / "data_status.pt")
    dist.barrier()


def write_accelerate(directory: Path, models: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """accelerate's SHARDED_STATE_DICT: a folder for the model and one for the optimizer."""
    state = sharded_state(models["model"])
    dcp.save({"model": state}, checkpoint_id=directory / "pytorch_model_fsdp_0")
    moments = FullyShardedDataParallel.optim_state_dict(models["model"], optimizer)
    dcp.save({"optimizer": moments}, checkpoint_id=directory / "optimizer_0")


def data_status() -> list[dict[str, dict[int, list[int]]]]:
    """Where the data loader of each rank is."""
    return [{"t2i": {0: [rank, STEP, 1], 1: [rank, 2, 3]}} for rank in range(dist.get_world_size())]


def sharded_state(module: nn.Module) -> dict[str, Any]:
    kind, config = StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(offload_to_cpu=True)
    with FullyShardedDataParallel.state_dict_type(module, kind, config):
        return module.state_dict()


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """On every rank: on CPUs, ``rank0_only`` frees what it still needs."""
    with FullyShardedDataParallel.state_dict_type(module, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
        return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def keep_truth(directory: Path, states: dict[str, dict[str, Tensor]]) -> None:
    if dist.get_rank() == 0:
        torch.save(states, directory / "truth.pt")


def make(directory: Path) -> None:
    if dist.get_rank() == 0:
        directory.mkdir(parents=True)
    dist.barrier()


def answers(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What a plain model with these weights says."""
    model: Bagel = build(SIZES)
    model.load_state_dict(state)
    with torch.no_grad():
        return model(*inputs())
