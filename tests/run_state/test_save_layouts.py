"""A save of any layout holds what torch's own save of it holds, bit for bit, and plain ``dcp.load`` reads it."""

from __future__ import annotations

import itertools
import pickle
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from shardsmith.errors import RankFailedError, UsageError
from shardsmith.formats.dcp import rank_file
from shardsmith.formats.dcp.load import load_into
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.checkpoints import find_damage
from shardsmith.manifest.metadata import read_metadata
from shardsmith.run_state.contents import Contents
from shardsmith.run_state.known_state import ask_torch
from shardsmith.run_state.save import SaveInProgress
from shardsmith.run_state.share import Share
from shardsmith.sharding.live_boxes import StagingBuffer
from shardsmith.sharding.local_boxes import local_boxes
from shardsmith.tensors.digest import digest_tensor
from shardsmith.tensors.tensors import read_tensor
from tests.box_indexes import assert_same_boxes
from tests.ranks import run_on_ranks
from tests.tensor_cases import DTYPES, random_tensor, raw_bytes

SHAPES = [(7, 5), (4, 8), (1, 3), (0, 4), (3, 0), (9,), (2,), (), (3, 2, 5), (130, 3)]
CPU = torch.device("cpu")
MESHES = [(4,), (2, 2)]


def placements(ndim: int, axes: int) -> list[tuple[Any, ...]]:
    ways = [Replicate(), *(Shard(d) for d in range(ndim))]
    return [*itertools.product(ways, repeat=axes)]


def tensors_of_every_layout() -> dict[str, Tensor]:
    """Every shape in every placement on every mesh, in one dtype after the other."""
    found: dict[str, Tensor] = {}
    meshes = [init_device_mesh("cpu", shape) for shape in MESHES]
    for mesh, shape in itertools.product(meshes, SHAPES):
        for place in placements(len(shape), mesh.ndim):
            dtype = DTYPES[len(found) % (len(DTYPES) - 1)]  # torch cannot shard float4
            whole = random_tensor(shape, torch.uint8 if dtype.itemsize == 1 else dtype, len(found))
            sharded = distribute_tensor(whole, mesh, place, src_data_rank=None)
            if dtype.itemsize == 1 and dtype is not torch.uint8:
                local = sharded.to_local().bitwise_and(1 if dtype is torch.bool else 255).view(dtype)
                sharded = DTensor.from_local(
                    local, mesh, place, run_check=False, shape=torch.Size(shape), stride=whole.stride()
                )
            found[f"t{len(found)}.{mesh.ndim}d"] = sharded
    return found


def everything() -> dict[str, Any]:
    rank = dist.get_rank()
    plain = {str(dtype): random_tensor((3, 4), dtype, 7) for dtype in DTYPES}
    strided = {"t": random_tensor((4, 6), torch.float32, 1).t(), "row": random_tensor((4, 6), torch.int16, 2)[:, 1]}
    lazy = {"conj": random_tensor((3,), torch.complex64, 3).nan_to_num().conj()}
    return {
        **tensors_of_every_layout(),
        "plain": {**plain, **strided, **lazy, "empty": torch.empty(0, 3)},
        "objects": {"lr": 0.25, "none": None, "betas": (0.9, 0.95), "text": "x", "list": [1, "a"], "d": {}},
        "mixed": [torch.ones(2), {"a": 1}],
        "rng": {f"rank-{rank}": {"torch": torch.get_rng_state(), "python": (3, (1, 2, rank), None)}},
        f"stage-{rank // 2}": {"w": torch.full((3,), rank // 2), "name": f"stage {rank // 2}"},
    }


def save(state: dict[str, Any], path: Path, share: Share, buffer: StagingBuffer | None, step: int = 1) -> Path:
    job = SaveInProgress(path / f"step-{step}", Ranks(), share)
    job.begin(lambda: Contents(step=step, state_dict=state), buffer=buffer)
    if buffer is not None:
        spoil(state)
    job.write()
    return job.commit()


def parts(value: Tensor) -> list[Tensor]:
    return [held for _, held in local_boxes(value)]


def flat(state: Any) -> dict[str, Any]:
    return dict(torch.distributed.checkpoint._nested_dict.flatten_state_dict(state)[0])


@torch.no_grad()
def spoil(state: dict[str, Any]) -> None:
    for value in flat(state).values():
        for held in parts(value) if isinstance(value, Tensor) else []:
            held.copy_(torch.zeros(held.shape, dtype=held.dtype))


def resolved(tensor: Tensor) -> bytes:
    return raw_bytes(tensor.resolve_conj())


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, Tensor):
            assert [*map(resolved, parts(value))] == [*map(resolved, parts(other[key]))], key
        else:
            assert value == other[key], key


def by_torch(state: dict[str, Any], checkpoint: Path) -> None:
    dcp.load(state, checkpoint_id=checkpoint)


def assert_loaded(checkpoint: Path) -> None:
    """By torch, from ``.metadata``, and by us, from ``.boxes``."""
    for load in (by_torch, partial(load_into, allow_pickle=True)):
        loaded = everything()
        spoil(loaded)
        load(loaded, checkpoint)
        assert_same(loaded, everything())


def assert_same_index(ours: Path, theirs: Path) -> None:
    one, other = DcpSource(ours), DcpSource(theirs)
    assert_same_boxes(ours)
    assert dict(one.specs) == dict(other.specs)
    assert one.index.containers == other.index.containers
    recorded = read_metadata(ours).tensors
    for key in one.specs:
        assert raw_bytes(read_tensor(one, key)) == raw_bytes(read_tensor(other, key)), key
        assert str(digest_tensor(read_tensor(one, key))) == recorded[key].digest, key
    for key in other.index.objects:
        assert one.read_object(key, allow_pickle=True) == other.read_object(key, allow_pickle=True), key


def test_every_layout_holds_what_torch_saves_and_is_read_by_torch(tmp_path: Path) -> None:
    run_on_ranks(run_every_layout, 4, tmp_path, tmp_path)


def run_every_layout(directory: Path) -> None:
    dcp.save(everything(), checkpoint_id=directory / "torch")
    share, buffer = Share(dist.get_rank()), StagingBuffer()
    for step, staging in [(1, buffer), (2, None), (3, buffer)]:
        ours = save(everything(), directory / "ours", share, staging, step)
        if dist.get_rank() == 0:
            assert find_damage(ours) == []
            saved = pickle.loads((ours / ".metadata").read_bytes())  # from the second save on it is patched
            assert saved.storage_meta.save_id == read_metadata(ours).attempt
            assert_same_index(ours, directory / "torch")
        assert_loaded(ours)
    share = Share(dist.get_rank())
    rank_file.MOST_BYTES = 32  # boxes in several archives
    cut = save(everything(), directory / "cut", share, buffer)
    if dist.get_rank() == 0:
        assert_same_index(cut, directory / "torch")
        assert max(len(entry.chunks) for entry in DcpSource(cut).index.tensors.values()) > 16
    assert_loaded(cut)


def test_tensors_that_are_more_than_their_bytes_are_refused_by_name_before_anything_is_written(tmp_path: Path) -> None:
    values = torch.arange(6.0).reshape(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that quantized and nested tensors may change
        state = {
            "dense": values,
            "quantized": torch.quantize_per_tensor(values, 0.1, 0, torch.qint8),
            "sparse": values.to_sparse(),
            "nested": torch.nested.nested_tensor([values, values[:1]], layout=torch.jagged),
        }
    with pytest.raises(UsageError, match="only dense tensors can be saved; nothing was written") as error:
        save(state, tmp_path, Share(0), None)
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:-1]] == [*state][1:]
    assert [*tmp_path.iterdir()] == []


def test_partial_tensors_are_refused_by_name_on_all_ranks(tmp_path: Path) -> None:
    run_on_ranks(run_partial, 2, tmp_path, tmp_path)


def run_partial(directory: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    state = {name: DTensor.from_local(torch.ones(3), mesh, [Partial()]) for name in ("loss", "norm")}
    with pytest.raises(RankFailedError, match="only dense tensors can be saved") as error:
        save({"good": torch.ones(2), **state}, directory / "run", Share(dist.get_rank()), None)
    assert all(name in str(error.value) for name in ("loss: a DTensor", "norm: a DTensor", "redistribute"))
    assert "good" not in str(error.value)
    assert not (directory / "run").exists()
    whole = {name: tensor.redistribute(placements=[Replicate()]) for name, tensor in state.items()}
    path = save(whole, directory / "whole", Share(dist.get_rank()), None)
    assert torch.equal(read_tensor(DcpSource(path), "loss"), torch.full((3,), 2.0))


def build(kind: str) -> nn.Module:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 5))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    if kind == "fsdp2 + tp":
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model[0], mesh=mesh["dp"])
        fully_shard(model[2], mesh=mesh["dp"])
    elif kind == "hsdp":
        fully_shard(model, mesh=mesh)
    elif kind == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=CPU)
    elif kind == "fsdp1 flat":
        return FullyShardedDataParallel(model, use_orig_params=False, device_id=CPU)
    elif kind == "fsdp1 hybrid":
        return FullyShardedDataParallel(
            model,
            device_mesh=mesh,
            sharding_strategy=ShardingStrategy.HYBRID_SHARD,
            use_orig_params=True,
            device_id=CPU,
        )
    return model


KINDS = ["fsdp2 + tp", "hsdp", "fsdp1", "fsdp1 flat", "fsdp1 hybrid", "none"]


@pytest.mark.parametrize("kind", KINDS)
def test_models_and_optimizers_of_every_sharding_do(tmp_path: Path, kind: str) -> None:
    run_on_ranks(run_model, 4, tmp_path, tmp_path, kind)


def run_model(directory: Path, kind: str) -> None:
    model = build(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    def state() -> dict[str, Any]:
        found = ask_torch(model, [optimizer])
        return {"model": found.model, "optimizer": found.optimizer}

    dcp.save(state(), checkpoint_id=directory / "torch")
    ours = save(state(), directory / "ours", Share(dist.get_rank()), None)
    if dist.get_rank() == 0:
        assert_same_index(ours, directory / "torch")
    loaded = state()
    dcp.load(loaded, checkpoint_id=ours)
    assert_same(loaded, state())


def test_of_replicas_every_rank_writes_its_part(tmp_path: Path) -> None:
    run_on_ranks(run_replicas, 4, tmp_path, tmp_path)


def run_replicas(directory: Path) -> None:
    state = {f"w{i}": torch.ones(1000, 10 + i) for i in range(20)} | {f"o{i}": i for i in range(40)}
    path = save(state, directory, Share(dist.get_rank()), None)
    sizes = [(path / f"__{rank}_0.distcp").stat().st_size for rank in range(4)]
    assert max(sizes) < 1.2 * min(sizes)
