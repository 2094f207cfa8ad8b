"""What the directories ``step-3`` in ``tests/golden`` hold, and how: ``python -m tests.golden_checkpoint DIRECTORY``.

The shards of ``sharded`` were written by torch, for an older version of ours, those of ``engine`` by our own writer,
those of ``boxes`` by the first that has also written ``.boxes``.
They stay as they are: a later version must read them. A change of the format gets a directory of its own.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import distribute_tensor, init_device_mesh
from torch.distributed.tensor.placement_types import Shard

from shardsmith.ground.ranks import Ranks
from shardsmith.run_state.contents import Contents
from shardsmith.run_state.save import SaveInProgress
from tests.ranks import run_on_ranks

GOLDEN = Path(__file__).parent / "golden"
SHARDED = GOLDEN / "sharded" / "step-3"
ENGINE = GOLDEN / "engine" / "step-3"
BOXES = GOLDEN / "boxes" / "step-3"

SPECS: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "embed.weight": ((7, 6), torch.float32),
    "layer.weight": ((5, 4, 3), torch.bfloat16),
    "layer.scale": ((9,), torch.float8_e4m3fn),
    "norm.bias": ((3,), torch.float64),
    "norm.steps": ((), torch.int64),
    "mask": ((2, 5), torch.bool),
    "empty": ((0, 4), torch.float16),
    "ema_model.embed.weight": ((7, 6), torch.float32),
    "ema_model.layer.weight": ((5, 4, 3), torch.float32),
    "optimizer.state.embed.weight.step": ((), torch.float32),
    "train_state.step": ((), torch.int64),
}
"""Shape and dtype by key."""


def patterned(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """A tensor whose bytes follow a rule that is easy to repeat elsewhere: byte i is (37 i + 11 seed) mod 256."""
    data = torch.tensor([(37 * i + 11 * seed) % 256 for i in range(math.prod(shape) * dtype.itemsize)])
    data = data.to(torch.uint8)
    return (data & 1 if dtype == torch.bool else data).view(dtype).reshape(shape)


def golden_tensors() -> dict[str, Tensor]:
    """The tensors of the golden checkpoint, by key."""
    return {key: patterned(*spec, seed) for seed, (key, spec) in enumerate(SPECS.items())}


def run_write(directory: Path) -> None:
    """Save them on two ranks; those of more than one row are sharded, unevenly, the others replicated."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))

    def placed(key: str, tensor: Tensor) -> Tensor:
        sharded = key in ("embed.weight", "layer.weight", "layer.scale", "ema_model.embed.weight")
        place = [Shard(1 if key == "layer.weight" else 0)]
        return distribute_tensor(tensor, mesh, place, src_data_rank=None) if sharded else tensor

    tensors = {key: placed(key, tensor) for key, tensor in golden_tensors().items()}
    beside = ("ema_model.", "optimizer.", "train_state.")
    state: dict[str, Any] = {key: tensor for key, tensor in tensors.items() if not key.startswith(beside)}
    state["ema_model"] = {name: tensors[f"ema_model.{name}"] for name in ("embed.weight", "layer.weight")}
    state["optimizer"] = {"state": {"embed.weight": {"step": tensors["optimizer.state.embed.weight.step"]}}, "lr": 0.5}
    state["train_state"] = {"step": tensors["train_state.step"]}
    contents = Contents(
        step=3,
        state_dict=state,
        ema={"decay": 0.5, "updates": 3},
        tied={"head.weight": "embed.weight"},
        mesh={"shape": [2], "dim_names": ["dp_shard"]},
    )
    job = SaveInProgress(directory / "step-3", Ranks())
    job.begin(lambda: contents)
    job.write()
    job.commit()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        run_on_ranks(run_write, 2, Path(scratch), Path(sys.argv[1]))
