"""Models that begin with the wrong weights, the checkpoints that they should begin with, and what ranks do."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from shardsmith.errors import InitialLoadError
from shardsmith.hooks import Hooks, ShardedSave, at
from shardsmith.load.load import load_initial, verify_loaded
from tests.dcp_directories import save
from tests.hooks.live_models import Case, build, shard
from tests.trained_runs import Odd

ANGLES = {"angles": torch.arange(4.0)}
"""The buffer of ``Odd`` that no checkpoint holds."""
SOURCES = ("hf", "flat", "nested", "ours")
SHARDINGS = {
    "none": 1,
    "wrapped": 1,
    "fsdp2": 2,
    "wrapped-fsdp2": 2,
    "fsdp1": 2,
    "fsdp1-flat": 2,
    "ddp": 2,
    "tp": 2,
    "hsdp": 4,
    "tp-fsdp2": 4,
    "fsdp1-hybrid": 4,
}


def made(kind: str, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with weights that look trained: none is constant, all are small."""
    model = build(Case(kind=kind, sharding="none", ranks=0, live_dtype=dtype))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 8)
    if isinstance(model, Odd):
        model.angles.copy_(ANGLES["angles"])
    return model


def make_sources(kind: str, directory: Path) -> dict[str, Tensor]:
    """The same weights in every format; as a state dict, too."""
    model = made(kind)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save(dict(state), directory / "flat")
    save({"model": dict(state)}, directory / "nested")
    hooks = Hooks(ShardedSave(directory, model=model, when=at(1), async_mode="disabled"))
    hooks.resume()
    hooks.step(1)
    hooks.close()
    (directory / "step-1").rename(directory / "ours")
    if kind == "odd":
        (directory / "hf").mkdir()
        save_file(state, directory / "hf" / "model.safetensors")
    else:
        model.save_pretrained(directory / "hf")
    return state


def started(kind: str, sharding: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A sharded model with random weights, the same on every rank, and zeros for the buffers that nobody saves."""
    model = build(Case(kind=kind, sharding=sharding, ranks=0, live_dtype=dtype))
    if isinstance(model, Odd):
        model.angles.copy_(ANGLES["angles"])
    return shard(model, sharding)


def options(kind: str) -> dict[str, Any]:
    return {"fresh": ANGLES} if kind == "odd" else {}


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict; on rank 0 alone under FSDP1."""
    wrapped = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    whole = StateDictOptions(full_state_dict=True, cpu_offload=not wrapped)
    return dict(get_model_state_dict(model, options=whole))


def run_loads(kind: str, shardings: list[str], directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """Load every source under every sharding; the live model must then hold just its values."""
    truth = torch.load(directory / "truth.pt")
    for sharding in shardings:
        for source in SOURCES if sharding in ("none", "fsdp2") else SOURCES[-2:]:
            model = started(kind, sharding, dtype)
            report = load_initial(directory / source, model=model, **options(kind))
            assert report.tensors == len(truth), (sharding, source)
            assert report.digests == (
                "recorded" if source == "ours" and dtype == torch.float32 else "read from its files"
            )
            for name, tensor in gathered(model).items():
                assert torch.equal(tensor, truth[name].to(tensor.dtype)), (sharding, source, name)
            again = verify_loaded(model, directory / source, **options(kind))
            assert (again.tensors, again.loaded) == (report.tensors, False)


def plant_and_verify(model: nn.Module, plant: Callable[[nn.Module], None], path: Path, **found: Any) -> list[str]:
    """Break a live model; the codes of what is found."""
    with torch.no_grad():
        plant(model)
    try:
        verify_loaded(model, path, **found)
    except InitialLoadError as error:
        return sorted(set(error.codes))
    return []


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def on_rank(rank: int) -> bool:
    return (dist.get_rank() if dist.is_initialized() else 0) == rank


NAN = math.nan
