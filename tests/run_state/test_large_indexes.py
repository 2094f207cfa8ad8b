"""An index that is too large to be kept is made anew at each save, part by part, and is the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from shardsmith.ground.layout import BOX_INDEX_FILE, DCP_INDEX_FILE
from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.checkpoints import find_damage
from shardsmith.manifest.metadata import read_metadata
from shardsmith.run_state import whole_directory
from shardsmith.run_state.contents import Contents
from shardsmith.run_state.save import SaveInProgress
from shardsmith.run_state.share import Share
from tests.ranks import run_on_ranks


def values(step: int) -> dict[str, torch.Tensor]:
    return {f"layers.{i}.w": torch.arange(40.0).view(8, 5) + 100 * i + step for i in range(30)}


def test_it_is_read_as_any_other(tmp_path: Path) -> None:
    run_on_ranks(run_saves, 2, tmp_path, tmp_path)
    kept, first, second = (tmp_path / name / "step-1" for name in ("kept", "first", "second"))
    told = {path: read_metadata(path).attempt.encode() for path in (kept, first, second)}
    for path in (first, second):
        assert find_damage(path) == []
        assert (path / BOX_INDEX_FILE).read_bytes() == (kept / BOX_INDEX_FILE).read_bytes()
        content = (path / DCP_INDEX_FILE).read_bytes()
        assert content.replace(told[path], told[kept]) == (kept / DCP_INDEX_FILE).read_bytes()
        state: dict[str, Any] = {"model": {key: torch.zeros(8, 5) for key in values(1)}}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, checkpoint_id=path)
        assert all(torch.equal(state["model"][key], value) for key, value in values(1).items())


def run_saves(directory: Path) -> None:
    mesh, share = init_device_mesh("cpu", (2,)), Share(dist.get_rank())
    model = {key: distribute_tensor(value, mesh, [Shard(0)]) for key, value in values(1).items()}
    state = {"model": model, "rng": {f"rank-{dist.get_rank()}": "state"}}
    for name in ("kept", "first", "second"):
        whole_directory._MOST_KEPT = 1 << 20 if name == "kept" else 0
        # The first two have a share of their own: what was kept for one is not patched for the other.
        job = SaveInProgress(directory / name / "step-1", Ranks(), Share(dist.get_rank()) if name == "kept" else share)
        job.begin(lambda: Contents(step=1, state_dict=state))
        job.write()
        job.commit()
