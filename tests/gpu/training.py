"""Small real training runs on one device: sharded, cast, scaled and compiled in the ways that people use."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffload, CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from shardsmith.hooks import EMA, HFExport, Hooks, ShardedSave, at, every, last
from tests.gpu.devices import device, is_on_accelerator

STEPS = 6
SAVED_EVERY = 3
EXPORTED = (2, 5, 6)
_WORDS = 23

Sharding = Literal["none", "ddp", "fsdp2", "fsdp2-offload", "fsdp1", "fsdp1-offload"]


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a run trains."""

    sharding: Sharding = "none"
    dtype: torch.dtype = torch.float32
    scaled: bool = False
    """With autocast and a GradScaler."""
    compiled: bool = False
    offloaded_average: bool = False
    overlapped: bool = False
    """Saves and exports copy while the training goes on."""
    backend: str = "gloo"

    def __str__(self) -> str:
        marks = {
            str(self.dtype)[6:]: self.dtype != torch.float32,
            "scaled": self.scaled,
            "compiled": self.compiled,
            "offloaded average": self.offloaded_average,
            "overlapped": self.overlapped,
            self.backend: self.backend != "gloo",
        }
        return ", ".join([self.sharding, *(mark for mark, is_so in marks.items() if is_so)])


class Small(nn.Module):
    """Dropout draws from the device's generator, a buffer counts, some weights are frozen, two are one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(_WORDS, 32)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)) for _ in range(2))
        self.dropout = nn.Dropout(0.1)
        self.norm = nn.LayerNorm(32)
        self.norm.requires_grad_(False)
        self.head = nn.Linear(32, _WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen += tokens.numel()
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = hidden + self.dropout(layer(hidden))
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def build(way: Way) -> nn.Module:
    """The same weights in every run and on every rank, on the device, sharded."""
    torch.manual_seed(5)
    model: nn.Module = Small().to(device(), way.dtype)
    if way.sharding.startswith("fsdp2"):
        policy: dict[str, Any] = {"offload_policy": CPUOffloadPolicy()} if way.sharding == "fsdp2-offload" else {}
        for layer in [*model.get_submodule("layers").children(), model]:
            fully_shard(layer, mesh=mesh(), **policy)
    elif way.sharding.startswith("fsdp1"):
        offload = CPUOffload(offload_params=True) if way.sharding == "fsdp1-offload" else None
        # the frozen norm beside trained weights needs the original parameters
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=device(), cpu_offload=offload)
    elif way.sharding == "ddp":
        model = DistributedDataParallel(model)
    if way.compiled:  # neither of the two needs a compiler on the machine
        model = torch.compile(model, backend="cudagraphs" if device().type == "cuda" else "aot_eager")
    seed_all(100)
    return model


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)


def mesh() -> DeviceMesh:
    return init_device_mesh(device().type, (dist.get_world_size(),))


class Run:
    """A model, its optimizer, and hooks that save and export it."""

    def __init__(self, way: Way, directory: Path) -> None:
        self.way = way
        self.directory = directory
        self.model = build(way)
        fused = is_on_accelerator() and not way.sharding.endswith("offload")
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], 1e-2, fused=fused)
        self.scaler = torch.amp.GradScaler(device().type, init_scale=256.0) if way.scaled else None
        self.ema = EMA(self.model, decay=0.9, offload=way.offloaded_average)
        parts: dict[str, Any] = {"optimizer": self.optimizer, "stateful": {"scaler": self.scaler} if way.scaled else {}}
        when = every(SAVED_EVERY) | last()
        parts["staging"] = staging = "overlap" if way.overlapped else "copy"
        self.save = ShardedSave(directory / "saves", model=self.model, ema=self.ema, when=when, **parts)
        self.export = HFExport(
            directory / "exports", model=self.model, ema=self.ema, when=at(*EXPORTED), dtype="original", staging=staging
        )
        self.hooks = Hooks(self.ema, self.save, self.export)

    def train(self, steps: int) -> dict[int, dict[str, Tensor]]:
        """Train up to a step, from where the last run ended; at each export what the weights were."""
        step = self.hooks.resume()
        truth = {}
        while step < steps:
            self._step()
            step += 1
            if step in EXPORTED:
                truth[step] = weights_of(self.model)
            self.hooks.step(step)
        self.hooks.close()
        return truth

    def _step(self) -> None:
        tokens = torch.randint(_WORDS, (4, 8)).to(device())
        with self._autocast():
            loss = nn.functional.cross_entropy(self.model(tokens).float().flatten(0, 1), tokens.flatten())
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        if not self.way.scaled:
            yield
            return
        with torch.autocast(device().type, torch.float16 if is_on_accelerator() else torch.bfloat16):
            yield


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of whole tensors, in torch's own way."""
    # torch 2.13 would crash with cpu_offload for FSDP1 on CPUs: there is no other device to unshard on
    options = StateDictOptions(full_state_dict=True, cpu_offload=is_on_accelerator())
    found = get_model_state_dict(model, options=options)
    return {name: value.detach().cpu().clone() for name, value in found.items()}
