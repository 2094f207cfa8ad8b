"""Digests of live tensors are those of the whole ones, however they are held."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from shardsmith.errors import RankFailedError
from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.metadata import TensorRecord
from shardsmith.sharding.live_digest import OTHER_VALUES, compare_digests, digest_live
from shardsmith.tensors.digest import digest_tensor
from tests.ranks import run_on_ranks


def whole() -> dict[str, Tensor]:
    torch.manual_seed(4)
    return {
        "rows": torch.randn(7, 5),
        "columns": torch.randn(5, 3).bfloat16(),
        "replicated": torch.randn(4),
        "counter": torch.tensor(2**40),
        "mask": torch.tensor([True, False]),
        "nothing": torch.empty(0, 3),
    }


def test_shards_replicas_and_plain_tensors_add_up_to_the_whole(tmp_path: Path) -> None:
    run_on_ranks(run_digests, 2, tmp_path)


def run_digests() -> None:
    mesh = init_device_mesh("cpu", (2,))
    expected = whole()
    live = dict(expected)
    for name, placement in (("rows", Shard(0)), ("columns", Shard(1)), ("replicated", Replicate())):
        live[name] = distribute_tensor(expected[name], mesh, [placement])
    live["own"] = torch.full((3,), float(dist.get_rank()))  # such as a buffer under DDP: that of rank 0 counts
    ranks = Ranks()
    found = digest_live(ranks, "looking", lambda: live)
    expected["own"] = torch.zeros(3)
    assert {name: record.digest for name, record in found.items()} == {
        name: str(digest_tensor(value)) for name, value in expected.items()
    }
    assert (found["columns"].shape, found["columns"].dtype) == ((5, 3), "bfloat16")
    with pytest.raises(RankFailedError, match="rank 1: KeyError"):
        digest_live(ranks, "looking again", lambda: {"a": [torch.ones(1)][0]} if dist.get_rank() == 0 else {}["a"])


def test_every_difference_is_named() -> None:
    recorded = digest_live(Ranks(), "looking", whole)
    live = dict(recorded)
    live["rows"] = TensorRecord(shape=(7, 5), dtype="float32", digest="0" * 32)
    live["mask"] = TensorRecord(shape=(3,), dtype="bool", digest=recorded["mask"].digest)
    live["more"] = live.pop("counter")
    assert compare_digests(live, recorded, {}) == {
        "counter": "recorded, but the model has none",
        "mask": "is (3,) bool, was (2,) bool",
        "more": "was not recorded",
        "rows": OTHER_VALUES,
    }
    assert compare_digests(recorded, recorded, {}) == {}
    assert "counter" not in compare_digests(live, recorded, {"counter": "rows"})
