"""Boxes of DTensors, compared with what torch gives each rank of a tensor whose elements are their own indices."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from shardsmith.sharding.local_boxes import local_boxes
from tests.ranks import run_on_ranks

MESHES = {
    (4,): [
        (_StridedShard(0, split_factor=2),),
        (_StridedShard(1, split_factor=3),),
        (_StridedShard(-1, split_factor=2),),
        (_StridedShard(2, split_factor=1),),
    ],
    (2, 2): [
        (_StridedShard(0, split_factor=2), Shard(0)),
        (_StridedShard(1, split_factor=2), Shard(1)),
        (Shard(0), _StridedShard(1, split_factor=2)),
        (_StridedShard(0, split_factor=2), _StridedShard(0, split_factor=3)),
        (Replicate(), _StridedShard(2, split_factor=4)),
        (Shard(0), Shard(0)),
        (Shard(2), Replicate()),
    ],
}
SHAPES = [(8, 8, 8), (5, 7, 3), (12, 2, 16), (1, 9, 1), (16, 1, 0)]


def run_boxes() -> None:
    for sizes, placements in MESHES.items():
        mesh = dist.init_device_mesh("cpu", sizes)
        for shape in SHAPES:
            whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
            for chosen in placements:
                tensor = distribute_tensor(whole, mesh, chosen, src_data_rank=None)
                found = local_boxes(tensor)
                for box, values in found:
                    part = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
                    assert torch.equal(values, whole[part]), (shape, chosen)
                held = [index for _, values in found for index in values.flatten().tolist()]
                assert sorted(held) == sorted(tensor.to_local().flatten().tolist()), (shape, chosen)


def test_boxes_hold_what_torch_gives_the_rank_however_it_is_split(tmp_path: Path) -> None:
    run_on_ranks(run_boxes, 4, tmp_path)
