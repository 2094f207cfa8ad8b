"""What ranks hold after a load is compared with what was recorded, and all that differs is named on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.metadata import CheckpointMetadata, TensorRecord
from shardsmith.run_state.verification import verify_state
from shardsmith.tensors.digest import digest_tensor
from tests.ranks import error_of_all, run_on_ranks


def model() -> nn.Module:
    torch.manual_seed(3)
    found = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Linear(10, 6, bias=False))
    return found.bfloat16()


def manifest(tensors: dict[str, Tensor]) -> CheckpointMetadata:
    records = {
        name: TensorRecord(
            shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."), digest=str(digest_tensor(tensor))
        )
        for name, tensor in tensors.items()
    }
    return CheckpointMetadata(
        attempt="0" * 16,
        step=1,
        created_at="2026-01-01T00:00:00+00:00",
        models=(),
        counts={},
        ema=None,
        tied={},
        world_size=4,
        mesh=None,
        files={},
        tensors=records,
    )


def run_verified() -> None:
    """HSDP: two replicas of two shards; buffers are plain tensors that all ranks have."""
    rank, ranks, path = dist.get_rank(), Ranks(), Path("step-1")
    whole = {f"model.{name}": tensor.clone() for name, tensor in model().state_dict().items()}
    sharded = fully_shard(model(), mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard")))
    state: dict[str, Any] = {"model": sharded.state_dict(), "rng": {f"rank-{rank}": torch.full((2,), rank)}}
    assert verify_state(ranks, state, path, manifest(whole)) == len(whole)

    with torch.no_grad():
        state["model"]["2.weight"]._local_tensor[0, 0] += 1  # on all ranks alike
        if rank == 3:  # one replica
            state["model"]["0.weight"]._local_tensor[1, 1] += 1
            state["model"]["1.running_mean"][2] += 1
    recorded = manifest({**whole, "model.0.bias": whole["model.0.bias"].float()})
    del recorded.tensors["model.1.num_batches_tracked"]
    error = error_of_all(lambda: verify_state(ranks, state, path, recorded))
    assert [line.strip() for line in error.splitlines() if line.strip().startswith("model.")] == [
        "model.0.weight: ranks that hold the same part of it hold different values",
        "model.1.running_mean: ranks that hold the same part of it hold different values",
        "model.0.bias: is bfloat16, in the checkpoint float32",
        "model.1.num_batches_tracked: is int64, in the checkpoint not there",
        "model.2.weight: its values are not those that were saved",
    ]
    assert "5 tensors are not what was saved" in error


def test_every_tensor_that_is_not_what_was_saved_is_named(tmp_path: Path) -> None:
    run_on_ranks(run_verified, 4, tmp_path)
