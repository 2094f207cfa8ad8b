"""A save of a model with many tensors: a rank tells the others some 20 bytes a tensor; the store refuses 8 MiB.

With 45,000 tensors, as models with separate experts have them, it takes minutes on a busy machine.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from shardsmith.formats.dcp.source import DcpSource
from shardsmith.ground import ranks as ground_ranks
from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.metadata import read_metadata
from shardsmith.run_state.contents import Contents
from shardsmith.run_state.save import SaveInProgress
from shardsmith.run_state.share import Share
from shardsmith.tensors.tensors import read_tensor
from tests.ranks import run_on_ranks

TENSORS = 9_000


def test_two_ranks_tell_each_other_few_bytes_a_tensor(tmp_path: Path) -> None:
    run_on_ranks(run_many, 2, tmp_path, tmp_path / "run")
    source = DcpSource(tmp_path / "run" / "step-1")
    assert len(source.specs) == len(read_metadata(tmp_path / "run" / "step-1").tensors) == TENSORS
    for number in (0, TENSORS // 2, TENSORS - 1):
        assert read_tensor(source, name_of(number)).tolist() == [number, number + 1]


def name_of(number: int) -> str:
    layer, expert, kind = number // 384, number // 3 % 128, ("gate", "up", "down")[number % 3]
    return f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj.weight"


def run_many(directory: Path) -> None:
    told: list[int] = []
    put = Ranks._put

    def measured(self: Ranks, key: str, outcome: ground_ranks._Outcome) -> list[str]:
        keys = put(self, key, outcome)
        told.append(len(self._store.get(key)))
        return keys

    Ranks._put = measured  # type: ignore[method-assign]
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    values = (torch.arange(TENSORS) + rank)[:, None].float().unbind()
    state = {name_of(n): DTensor.from_local(value, mesh, [Shard(0)], run_check=False) for n, value in enumerate(values)}
    job = SaveInProgress(directory / "step-1", Ranks(), Share(rank))
    job.begin(lambda: Contents(step=1, state_dict=state))
    job.write()
    job.commit()
    assert max(told) <= 30 * TENSORS
