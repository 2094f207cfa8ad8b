"""Small models of every kind, sharded in every way, exported once and gathered once, to compare the two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from shardsmith.hooks import EMA, HFExport, Hooks, at
from tests.trained_runs import SIZES, Odd

STEP = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """One export of one model."""

    kind: str
    sharding: str
    ranks: int
    dtype: str = "bfloat16"
    live_dtype: torch.dtype = torch.float32
    ema: bool = True
    ema_as: Literal["file", "directory"] = "file"
    max_shard_size: str | None = "5GB"

    def __str__(self) -> str:
        return f"{self.kind}-{self.sharding}-{self.ranks}"


CASES = [
    Case(kind="llama", sharding="none", ranks=0, dtype="original"),
    Case(kind="olmo2", sharding="wrapped", ranks=0, dtype="float32", live_dtype=torch.bfloat16),
    Case(kind="vit", sharding="none", ranks=0, dtype="float32", max_shard_size="20KB"),
    Case(kind="odd", sharding="none", ranks=0, dtype="original"),
    Case(kind="gemma", sharding="fsdp2", ranks=1, dtype="float32"),
    Case(kind="odd", sharding="fsdp1", ranks=1),
    Case(kind="qwen3_moe", sharding="fsdp2", ranks=1, dtype="original"),
    Case(kind="llama", sharding="fsdp2", ranks=2, dtype="float32", max_shard_size="30KB", ema_as="directory"),
    Case(kind="olmo2", sharding="ddp", ranks=2, dtype="original", live_dtype=torch.bfloat16),
    Case(kind="qwen3", sharding="fsdp1", ranks=2, dtype="float32"),
    Case(kind="qwen3", sharding="fsdp1-flat", ranks=2, ema=False),
    Case(kind="qwen2", sharding="wrapped-fsdp2", ranks=2, dtype="original"),
    Case(kind="gemma", sharding="fsdp1", ranks=2),
    Case(kind="vit", sharding="tp", ranks=2, dtype="float32"),
    Case(kind="odd", sharding="fsdp2", ranks=2, dtype="original"),
    Case(kind="odd", sharding="tp", ranks=2),
    Case(kind="odd", sharding="fsdp1", ranks=2, dtype="original"),
    Case(kind="mixtral", sharding="fsdp2", ranks=2, dtype="float32", max_shard_size="30KB"),
    Case(kind="qwen3_moe", sharding="fsdp1", ranks=2, dtype="float32"),
    Case(kind="mixtral", sharding="tp", ranks=2),
    Case(kind="llama", sharding="tp", ranks=4),
    Case(kind="llama", sharding="tp-fsdp2", ranks=4, dtype="float32"),
    Case(kind="qwen2", sharding="hsdp", ranks=4, dtype="float32", max_shard_size="9KB"),
    Case(kind="vit", sharding="fsdp1-hybrid", ranks=4),
    Case(kind="gemma", sharding="ddp", ranks=4, ema_as="directory"),
    Case(kind="qwen3", sharding="fsdp2", ranks=4, dtype="original"),
    Case(kind="mixtral", sharding="hsdp", ranks=4, dtype="float32"),
    Case(kind="qwen3_moe", sharding="tp-fsdp2", ranks=4, dtype="float32", ema_as="directory"),
    Case(kind="olmo2", sharding="fsdp2", ranks=4, dtype="float32", live_dtype=torch.bfloat16),
    Case(kind="odd", sharding="hsdp", ranks=4),
    Case(kind="odd", sharding="fsdp2", ranks=4, dtype="original"),
    Case(kind="odd", sharding="tp-fsdp2", ranks=4, dtype="original"),
]


def build(case: Case) -> nn.Module:
    """The same weights on every rank, not yet sharded; some are frozen."""
    torch.manual_seed(0)
    if case.kind == "odd":
        return Odd()
    model = from_transformers(case.kind).to(case.live_dtype)
    if case.sharding != "fsdp1-flat":  # which wants a unit to be all frozen or not at all
        next(module for name, module in model.named_modules() if name.endswith("0.mlp")).requires_grad_(False)
    if case.live_dtype != torch.float32:
        model.model.norm.float()
    return model


def from_transformers(kind: str) -> nn.Module:
    import transformers  # takes seconds, which ranks without such a model need not spend

    if kind == "vit":
        shared = {name: SIZES[name] for name in SIZES if "heads" not in name or "key" not in name}
        config = transformers.ViTConfig(**shared, image_size=16, patch_size=8, num_labels=3)
        return transformers.ViTForImageClassification(config)
    name = {"olmo2": "Olmo2", "qwen3_moe": "Qwen3Moe"}.get(kind, kind.capitalize())
    more: dict[str, Any] = {"tie_word_embeddings": kind in ("qwen2", "gemma")}
    if kind in ("qwen3", "gemma", "qwen3_moe"):
        more["head_dim"] = 18
    if kind == "qwen3_moe":
        more |= {"moe_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2}
    if kind == "mixtral":
        more |= {"num_local_experts": 3, "intermediate_size": 52}  # rows of experts fill whole 16 bytes
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **more})
    return transformers.AutoModelForCausalLM.from_config(config)


def shard(model: nn.Module, sharding: str) -> nn.Module:
    """Wrap or change the model in one of the ways that people use."""
    if sharding.startswith("wrapped"):
        for name, module in [*model.named_modules()]:
            if name.endswith("layers.1"):
                model.set_submodule(name, checkpoint_wrapper(module))
    mesh = None
    if sharding.startswith("tp"):
        both = mesh_of("data", "tensor", rows=2 if sharding == "tp-fsdp2" else 1)
        tensor_parallel(model, both["tensor"])
        mesh = both["data"]
    if sharding == "hsdp":
        mesh = mesh_of("replicate", "shard", rows=2)
    if sharding.endswith("fsdp2") or sharding == "hsdp":
        layers = [module for name, module in model.named_modules() if name.rpartition(".")[0].endswith("layers")]
        for module in [*layers, model]:
            fully_shard(module, mesh=mesh)
    if sharding.startswith("fsdp1"):
        return fsdp1(model, sharding)
    if sharding.startswith("wrapped"):
        return torch.compile(model)
    return DistributedDataParallel(model) if sharding == "ddp" else model


def fsdp1(model: nn.Module, sharding: str) -> nn.Module:
    hybrid: dict[str, Any] = {}
    if sharding == "fsdp1-hybrid":
        hybrid = {
            "sharding_strategy": ShardingStrategy.HYBRID_SHARD,
            "device_mesh": mesh_of("replicate", "shard", rows=2),
        }
    flat = sharding == "fsdp1-flat"
    return FullyShardedDataParallel(model, use_orig_params=not flat, device_id=torch.device("cpu"), **hybrid)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Cut some weights by rows and some by columns, replicate others as DTensors, and leave the rest plain."""
    plan: dict[str, ParallelStyle] = {}
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.Linear):
            by_columns = name.endswith(("o_proj", "down_proj", "fc2", "frozen"))
            plan[name] = RowwiseParallel() if by_columns else ColwiseParallel()
        elif isinstance(module, nn.Embedding):
            plan[name] = ColwiseParallel()
        elif name.endswith("norm"):
            distribute_module(module, mesh)
    parallelize_module(model, mesh, plan)


def mesh_of(*names: str, rows: int) -> DeviceMesh:
    return init_device_mesh("cpu", (rows, dist.get_world_size() // rows), mesh_dim_names=names)


def run_cases(cases: list[Case], directory: Path) -> None:
    """Export each model with its average, and keep what they are: gathered, and of a twin that was never sharded."""
    for case in cases:
        model = shard(build(case), case.sharding)
        ema = EMA(model, decay=0.5) if case.ema else None
        options = {"dtype": case.dtype, "max_shard_size": case.max_shard_size, "ema_as": case.ema_as}
        exports = [
            HFExport(directory / str(case) / mode, model=model, ema=ema, when=at(STEP), write_mode=mode, **options)
            for mode in (["slices", "files"] if dist.is_initialized() else ["slices"])
        ]
        hooks = Hooks(*([ema] if ema else []), *exports)
        change(model, hooks)
        hooks.close()
        offload = not case.sharding.startswith(
            "fsdp1"
        )  # torch 2.13 would crash: there is no other device to unshard on
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=offload))
        if not dist.is_initialized() or dist.get_rank() == 0:
            keep_truth(case, whole, directory / str(case))


def keep_truth(case: Case, whole: dict[str, Tensor], directory: Path) -> None:
    """``files`` has the names of files, for which transformers renames some models; the rest those in memory."""
    twin = build(case)
    average = EMA(twin, decay=0.5)
    change(twin, Hooks(average))
    truth = {"main": whole, "ema": whole | average.model_state_dict()}
    if case.kind != "odd":
        twin.save_pretrained(directory / "hub")
    files = {model: named_as_in_files(twin, state) for model, state in truth.items()}
    torch.save({**truth, "twin": twin.state_dict(), "files": files}, directory / "truth.pt")


def named_as_in_files(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors but the ties of models from transformers."""
    if isinstance(model, Odd):
        return state
    from transformers.core_model_loading import revert_weight_conversion

    aliases = getattr(model, "all_tied_weights_keys", {})
    return revert_weight_conversion(model, {name: state[name] for name in state if name not in aliases})


@torch.no_grad()
def change(model: nn.Module, hooks: Hooks) -> None:
    """Two steps, in numbers that are exact however the weights are cut."""
    for step in range(1, STEP + 1):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
        hooks.step(step)
