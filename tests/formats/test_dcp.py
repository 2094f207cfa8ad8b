"""A DCP directory read through mapped files: always what torch itself loads, or an error."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import Shard as OldShard
from torch.distributed._shard.sharded_tensor import ShardedTensor, ShardMetadata, init_from_local_shards
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from shardsmith.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    MismatchError,
    UnsafeCheckpointError,
    UsageError,
)
from shardsmith.formats.dcp.load import load_into
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.tensors.tensors import Chunk, read_into, read_tensor
from tests import dcp_directories
from tests.ranks import run_on_ranks

WORLD_SIZES = [1, 2, 4]


def plain_tensors() -> dict[str, Tensor]:
    """Every kind of tensor, the same on each rank."""
    seed = torch.Generator().manual_seed(0)
    return {
        "float": torch.randn(7, 5, generator=seed),
        "bf16": torch.randn(9, 3, generator=seed).bfloat16(),
        "transposed": torch.randn(6, 4, generator=seed).t(),
        "channels_last": torch.randn(2, 3, 4, 5, generator=seed).contiguous(memory_format=torch.channels_last),
        "int": torch.arange(11),
        "bool": torch.arange(10) % 3 == 0,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "complex": torch.randn(5, dtype=torch.complex128, generator=seed),
        "float8": torch.arange(8.0).to(torch.float8_e4m3fn),
    }


class Model(nn.Module):
    """Rows that no world size divides, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False))
        self.register_buffer("steps", torch.tensor(4))


def sharded_tensors() -> dict[str, Any]:
    """A model under FSDP2 and DTensors of other placements, over all ranks."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    model = Model()
    fully_shard(model.inner, mesh=mesh)
    fully_shard(model, mesh=mesh)
    values = plain_tensors()
    placements = {
        "float": Shard(1),
        "bf16": Shard(0),
        "transposed": Shard(0),
        "int": Replicate(),
        "channels_last": Shard(3),
    }
    tensors = {f"d_{name}": distribute_tensor(values[name], mesh, [place]) for name, place in placements.items()}
    if world == 4:
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        tensors["d_two_ways"] = distribute_tensor(values["float"], both, [Shard(0), Shard(1)])
        tensors["d_hsdp"] = distribute_tensor(values["float"], both, [Replicate(), Shard(0)])
    tensors["d_one_row"] = distribute_tensor(torch.ones(1, 6), mesh, [Shard(0)])
    return {"model": model.state_dict(), "flat.name": tensors, **values}


def old_sharded_tensor(full: Tensor) -> ShardedTensor:
    """Rows of a tensor as FSDP1 shards them."""
    rank, parts = dist.get_rank(), full.clone().tensor_split(dist.get_world_size())
    above = sum(len(part) for part in parts[:rank])
    place = ShardMetadata([above, 0], list(parts[rank].shape), f"rank:{rank}/cpu")
    return init_from_local_shards([OldShard(parts[rank], place)], full.size())


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def flatten(state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in state.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def bits(tensor: Tensor) -> list[int]:
    return tensor.detach().contiguous().clone().reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []


def same(found: Tensor, expected: Tensor) -> bool:
    return (found.dtype, found.shape, bits(found)) == (expected.dtype, expected.shape, bits(expected))


def run_save(directory: str) -> None:
    state = sharded_tensors()
    full = {key: whole(value) for key, value in flatten(state).items()} | {"old": plain_tensors()["float"]}
    state |= {"lr": 0.25, "names": ["a", {"b": torch.ones(2)}], "old": old_sharded_tensor(full["old"])}
    dcp.save(state, checkpoint_id=directory)
    if dist.get_rank() == 0:
        torch.save(full, f"{directory}.pt")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By world size, a directory that so many ranks saved; beside it, the full tensors as a .pt file."""
    path = tmp_path_factory.mktemp("saved")
    for world_size in WORLD_SIZES:
        run_on_ranks(run_save, world_size, path, str(path / f"by-{world_size}"))
    return {world_size: path / f"by-{world_size}" for world_size in WORLD_SIZES}


@pytest.fixture(params=WORLD_SIZES)
def saved(request: pytest.FixtureRequest, directories: dict[int, Path]) -> Path:
    return directories[request.param]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory saved by this process alone."""
    state = {"model": plain_tensors(), "lr": 0.25, "path": Path("x")}
    return dcp_directories.save(state, tmp_path_factory.mktemp("one") / "step-5")


@pytest.fixture
def copy(one: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(one, tmp_path / "step-5"))


def expected(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(f"{directory}.pt")
    return found


def test_every_tensor_is_what_was_saved(saved: Path) -> None:
    source, tensors = DcpSource(saved), expected(saved)
    assert set(source.specs) == {*tensors, "names.1.b"}
    for name, tensor in tensors.items():
        assert same(read_tensor(source, name), tensor), name


def test_every_tensor_is_what_torch_loads(saved: Path) -> None:
    source = DcpSource(saved)
    asked = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in source.specs.items()}
    for name, tensor in dcp_directories.load(asked, saved).items():
        assert same(read_tensor(source, name), tensor), name


def test_any_box_of_a_tensor_can_be_read(saved: Path) -> None:
    source, tensors = DcpSource(saved), expected(saved)
    for name in ("flat.name.d_float", "flat.name.d_transposed", "model.inner.0.weight"):
        rows, columns = tensors[name].shape
        for top, left in [(0, 0), (1, 2), (rows - 1, columns - 1), (2, 0)]:
            box = Chunk((top, left), (rows - top, columns - left))
            found = read_into(source, name, box, torch.empty(box.sizes))
            assert same(found, tensors[name][top:, left:])


def test_pieces_tile_the_box_and_are_read_only_views(saved: Path) -> None:
    source = DcpSource(saved)
    for name, spec in source.specs.items():
        parts = list(source.pieces(name, Chunk.whole(spec.shape)))
        assert sum(part.numel for part, _ in parts) == spec.numel
        assert all(tuple(values.shape) == part.sizes for part, values in parts)


def test_nested_keys_know_their_place(saved: Path) -> None:
    containers = DcpSource(saved).index.containers
    assert containers["model.inner.0.weight"] == ("model", "inner.0.weight")
    assert containers["flat.name.d_float"] == ("flat.name", "d_float")
    assert containers["names.1.b"] == ("names", 1, "b")


def test_objects_are_read_and_unsafe_ones_refused(one: Path) -> None:
    source = DcpSource(one)
    assert source.read_object("lr") == 0.25
    with pytest.raises(UnsafeCheckpointError, match="PosixPath"):
        source.read_object("path")
    assert source.read_object("path", allow_pickle=True) == Path("x")
    with pytest.raises(CheckpointNotFoundError, match="no object named"):
        source.read_object("model.float")


def test_an_unknown_tensor_is_not_found(one: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no tensor named 'lr'"):
        list(DcpSource(one).pieces("lr", Chunk((), ())))


def test_views_outlive_a_closed_source(one: Path) -> None:
    source = DcpSource(one)
    ((_, values),) = source.pieces("model.int", Chunk.whole((11,)))
    source.close()
    source.close()
    assert values.tolist() == list(range(11))
    with pytest.raises(UsageError, match="was closed"):
        list(source.pieces("model.float", Chunk.whole((7, 5))))


def test_many_threads_read_the_same_as_one(saved: Path) -> None:
    source, tensors = DcpSource(saved), expected(saved)
    wrong: list[str] = []

    def read_all() -> None:
        wrong.extend(name for name, tensor in tensors.items() if not same(read_tensor(source, name), tensor))

    threads = [threading.Thread(target=read_all) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_chunk_that_is_not_what_the_index_says_is_corrupt(copy: Path) -> None:
    def swap(metadata: Metadata) -> None:
        other = metadata.storage_data[MetadataIndex("model.channels_last", torch.Size((0, 0, 0, 0)))]
        metadata.storage_data[MetadataIndex("model.float", torch.Size((0, 0)))] = other

    dcp_directories.edit_index(copy, swap)
    with pytest.raises(CorruptCheckpointError, match=r"'model.float'.*\(2, 3, 4, 5\).*\(7, 5\)"):
        read_tensor(DcpSource(copy), "model.float")


def test_every_shard_cut_off_or_deleted_is_incomplete(saved: Path, tmp_path: Path) -> None:
    for shard in sorted(file.name for file in saved.glob("*.distcp")):
        size = (saved / shard).stat().st_size
        for keep in (0, 1, size // 3, size // 2, size - 1, None):
            directory = Path(shutil.copytree(saved, tmp_path / f"{shard}-{keep}"))
            (directory / shard).unlink() if keep is None else os.truncate(directory / shard, keep)
            with pytest.raises(IncompleteCheckpointError, match=shard):
                DcpSource(directory)


def test_a_linked_cache_is_read_on_request(one: Path, tmp_path: Path) -> None:
    for file in one.iterdir():
        (tmp_path / file.name).symlink_to(file)
    with pytest.raises(UnsafeCheckpointError):
        DcpSource(tmp_path)
    assert same(read_tensor(DcpSource(tmp_path, follow_links=True), "model.float"), plain_tensors()["float"])


# load_into: in one process


def blank(state: dict[str, Any]) -> dict[str, Any]:
    return {key: blank(v) if isinstance(v, dict) else torch.zeros_like(v) for key, v in state.items()}


def test_a_nested_state_dict_is_filled_in_place(one: Path) -> None:
    state: dict[str, Any] = {"model": blank(plain_tensors()), "lr": None}
    tensors = dict(state["model"])
    load_into(state, one)
    assert state["lr"] == 0.25
    for name, tensor in plain_tensors().items():
        assert state["model"][name] is tensors[name]
        assert same(state["model"][name], tensor), name


def test_flat_keys_reach_the_same_tensors(one: Path) -> None:
    state = {f"model.{name}": torch.zeros_like(tensor) for name, tensor in plain_tensors().items()}
    load_into(state, one)
    assert all(same(state[f"model.{name}"], tensor) for name, tensor in plain_tensors().items())


def test_a_parameter_that_requires_grad_is_filled(one: Path) -> None:
    parameter = nn.Parameter(torch.zeros(7, 5))
    load_into({"model": {"float": parameter}}, one)
    assert same(parameter.data, plain_tensors()["float"])


def test_all_mismatches_are_reported_at_once_and_nothing_is_loaded(one: Path) -> None:
    good = torch.zeros(11, dtype=torch.int64)
    wrong = {"float": torch.zeros(7, 6), "bf16": torch.zeros(9, 3), "scalar": 3, "absent": torch.zeros(1), "int": good}
    with pytest.raises(MismatchError) as caught:
        load_into({"model": wrong, "lr": torch.zeros(1)}, one)
    assert caught.value.problems == [
        "lr: saved as an object, a tensor was asked for",
        "model.float: saved (7, 5) torch.float32, asked for (7, 6) torch.float32",
        "model.bf16: saved (9, 3) torch.bfloat16, asked for (9, 3) torch.float32",
        "model.scalar: saved as a tensor, an object (int) was asked for",
        "model.absent: not in the checkpoint",
    ]
    assert "Nothing was loaded" in str(caught.value)
    assert not good.any()


def test_a_cast_happens_only_on_request(one: Path) -> None:
    state = {"model": {"float": torch.zeros(7, 5, dtype=torch.bfloat16)}}
    with pytest.raises(MismatchError, match="allow_cast=True"):
        load_into(state, one)
    load_into(state, one, allow_cast=True)
    assert same(state["model"]["float"], plain_tensors()["float"].bfloat16())


def run_too_narrow(directory: Path) -> None:
    """Only the rank that holds the row sees the value, and both raise."""
    mesh = init_device_mesh("cpu", (2,))
    state = {"weight": distribute_tensor(torch.zeros(4, 3, dtype=torch.float16), mesh, [Shard(0)])}
    with pytest.raises(CheckpointError, match="weight: up to 1e\\+06"):
        load_into(state, directory, allow_cast=True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_cast_that_makes_finite_values_infinite_is_refused(tmp_path: Path) -> None:
    saved = torch.randn(4, 3)
    saved[3, 1], saved[0, 0] = -1e6, torch.inf  # the infinite one is meant
    dcp.save({"weight": saved, "b": torch.full((2,), 7e4)}, checkpoint_id=tmp_path / "step", no_dist=True)
    narrow = {"weight": torch.zeros(4, 3, dtype=torch.float16), "b": torch.zeros(2, dtype=torch.float16)}
    with pytest.raises(MismatchError, match="load into tensors of bfloat16 or float32") as caught:
        load_into(narrow, tmp_path / "step", allow_cast=True)
    assert caught.value.problems == ["b: up to 70000", "weight: up to 1e+06"]
    run_on_ranks(run_too_narrow, 2, tmp_path, tmp_path / "step")
    state = {"weight": torch.zeros(4, 3, dtype=torch.bfloat16)}  # as it says
    load_into(state, tmp_path / "step", allow_cast=True)
    assert same(state["weight"], saved.bfloat16())


def test_a_state_dict_on_the_wrong_level_is_told_where_to_go(one: Path) -> None:
    with pytest.raises(MismatchError, match="stored below 'model'"):
        load_into(blank(plain_tensors()), one)
    with pytest.raises(MismatchError, match="stored without 'outer'"):
        load_into({"outer": {"model": blank(plain_tensors())}}, one)


def test_an_unsafe_object_is_loaded_only_on_request(one: Path) -> None:
    state: dict[str, Any] = {"path": None}
    with pytest.raises(UnsafeCheckpointError, match="PosixPath"):
        load_into(state, one)
    load_into(state, one, allow_pickle=True)
    assert state["path"] == Path("x")


def test_a_tensor_that_was_retyped_to_an_object_is_refused(copy: Path) -> None:
    def retype(metadata: Metadata) -> None:
        metadata.state_dict_metadata["model.float"] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex("model.float")] = metadata.storage_data[MetadataIndex("path")]

    dcp_directories.edit_index(copy, retype)
    with pytest.raises(MismatchError, match="saved as an object"):
        load_into({"model": {"float": torch.zeros(7, 5)}}, copy, allow_pickle=True)


def test_a_directory_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no \.metadata"):
        load_into({"w": torch.zeros(1)}, tmp_path)


def test_a_hole_is_an_error_before_anything_is_loaded(copy: Path) -> None:
    def forget(metadata: Metadata) -> None:
        metadata.state_dict_metadata["model.float"].chunks.clear()  # type: ignore[union-attr]

    dcp_directories.edit_index(copy, forget)
    state = {"model": {"int": torch.zeros(11, dtype=torch.int64)}}
    with pytest.raises(IncompleteCheckpointError, match=r"'model\.float'"):
        load_into(state, copy)
    assert not state["model"]["int"].any()


# load_into: on several ranks, of checkpoints of other world sizes


def zero(state: dict[str, Any]) -> None:
    for value in flatten(state).values():
        local = value.to_local() if isinstance(value, DTensor) else value
        local.detach().zero_()


def zeroed() -> dict[str, Any]:
    """What ``run_save`` saves, as far as any number of ranks can hold it, with other values."""
    state = sharded_tensors()
    state["flat.name"] = {k: v for k, v in state["flat.name"].items() if k not in ("d_two_ways", "d_hsdp")}
    zero(state)
    return state | {"lr": None, "old": old_sharded_tensor(torch.zeros_like(plain_tensors()["float"]))}


def run_load(directories: list[str]) -> None:
    for directory in directories:
        ours, theirs = zeroed(), zeroed()
        load_into(ours, directory)
        dcp.load(theirs, checkpoint_id=directory)
        assert (ours.pop("lr"), theirs.pop("lr")) == (0.25, 0.25)
        tensors = expected(Path(directory))
        old = old_sharded_tensor(tensors["old"]).local_tensor()
        assert same(ours.pop("old").local_tensor(), old)
        assert same(theirs.pop("old").local_tensor(), old)
        values = flatten(theirs)
        for key, value in flatten(ours).items():
            assert same(whole(value), tensors[key]), key
            assert same(whole(value), whole(values[key])), key


def run_load_with_one_rank_wrong(directory: str) -> None:
    rows = 7 if dist.get_rank() == 0 else 8
    state = {"float": torch.zeros(rows, 5)}
    with pytest.raises(CheckpointError, match=r"asked for \(8, 5\)") as caught:
        load_into(state, directory)
    assert isinstance(caught.value, MismatchError) == (dist.get_rank() == 1)
    assert not state["float"].any()
    dist.barrier()  # the group is still in order


def run_load_what_one_rank_cannot_see(directory: str) -> None:
    with pytest.raises(CheckpointError, match=r"no \.metadata"):
        load_into(
            {"int": torch.zeros(11, dtype=torch.int64)}, directory if dist.get_rank() == 0 else f"{directory}-elsewhere"
        )
    dist.barrier()


def run_all_loads(directories: list[str]) -> None:
    run_load(directories)
    if dist.get_world_size() == 2:
        run_load_with_one_rank_wrong(directories[0])
        run_load_what_one_rank_cannot_see(directories[0])


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_state_dict_is_loaded_on_another_world_size(
    directories: dict[int, Path], tmp_path: Path, world_size: int
) -> None:
    run_on_ranks(run_all_loads, world_size, tmp_path, [str(path) for path in directories.values()])
