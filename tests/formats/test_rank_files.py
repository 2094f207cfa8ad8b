"""Folders with one file a rank: verl's, and those of scripts on FSDP1 and FSDP2. Written by real ranks with torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from shardsmith.errors import CheckpointError, IncompleteCheckpointError
from shardsmith.formats.by_path import detect_checkpoint_format, model_names, open_source
from shardsmith.formats.torch_files.files import read_torch_file
from shardsmith.tensors.tensors import read_tensor
from tests.ranks import run_on_ranks


class Net(nn.Module):
    """Uneven on two and three ranks, with buffers that every rank holds whole."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 7)
        self.head = nn.Linear(7, 3, bias=False)
        self.register_buffer("scalar", torch.tensor(7))
        self.register_buffer("one", torch.tensor([1.5]))
        self.register_buffer("mask", torch.tensor([True, False, True]))


def make_net() -> Net:
    torch.manual_seed(5)
    return Net()


def fsdp2_state() -> dict[str, Any]:
    net = make_net()
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return net.state_dict()


def hsdp_state() -> dict[str, Any]:
    net = make_net()
    fully_shard(net, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    return net.state_dict()


def mesh_2d() -> DeviceMesh:
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))


def tp_state() -> dict[str, Any]:
    """Tensor parallel within FSDP2: rows are cut twice, by the inner mesh first."""
    net, mesh = make_net(), mesh_2d()
    parallelize_module(net, mesh["tp"], {"body": ColwiseParallel(), "head": RowwiseParallel()})
    fully_shard(net, mesh=mesh["dp"])
    return net.state_dict()


def hsdp_tp_state() -> dict[str, Any]:
    net = make_net()
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("replicate", "shard", "tp"))
    parallelize_module(net, mesh["tp"], {"body": ColwiseParallel(), "head": RowwiseParallel()})
    fully_shard(net, mesh=mesh["replicate", "shard"])
    return net.state_dict()


def strided_otherwise() -> dict[str, Any]:
    """Strides that no trainer makes: they are not guessed at."""
    state = tp_state()
    weight = state["body.weight"]
    place = (_StridedShard(0, split_factor=3), Shard(0))
    object.__setattr__(weight._spec, "placements", place)
    return {"body.weight": weight}


def cut_by_the_order_of_the_mesh() -> dict[str, Any]:
    """Rows cut twice by DTensor itself: by the outer mesh first."""
    mesh = mesh_2d()
    placed = {"body.weight": [Shard(0), Shard(0)], "head.weight": [Shard(1), Shard(0)], "body.bias": [Shard(0)] * 2}
    state: dict[str, Any] = make_net().state_dict()
    return state | {name: distribute_tensor(state[name], mesh, placements) for name, placements in placed.items()}


def fsdp1_state(kind: StateDictType) -> dict[str, Any]:
    net = FullyShardedDataParallel(make_net(), device_id=torch.device("cpu"), use_orig_params=True)
    with FullyShardedDataParallel.state_dict_type(net, kind):
        return dict(net.state_dict())


def sharded_state() -> dict[str, Any]:
    return fsdp1_state(StateDictType.SHARDED_STATE_DICT)


def local_state() -> dict[str, Any]:
    return fsdp1_state(StateDictType.LOCAL_STATE_DICT)


def run_saves(folder: Path, name: str, state: Any) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.save(state(), folder / name.format(rank=rank, size=size))
    for beside in ("optim", "extra_state"):
        torch.save({"a": torch.ones(2)}, folder / f"{beside}_world_size_{size}_rank_{rank}.pt")


VERL = "model_world_size_{size}_rank_{rank}.pt"


def save(tmp_path: Path, ranks: int, name: str, state: Any) -> Path:
    folder = tmp_path / "actor"
    folder.mkdir()
    run_on_ranks(run_saves, ranks, tmp_path, folder, name, state)
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    source = open_source(folder)
    return {name: read_tensor(source, name) for name in source.specs}


@pytest.mark.parametrize(
    ("ranks", "name", "state"),
    [
        (1, VERL, fsdp2_state),
        (2, VERL, fsdp2_state),
        (3, VERL, fsdp2_state),
        (4, VERL, hsdp_state),
        (4, VERL, tp_state),
        (6, VERL, tp_state),
        (8, VERL, hsdp_tp_state),
        (4, VERL, cut_by_the_order_of_the_mesh),
        (6, VERL, cut_by_the_order_of_the_mesh),
        (2, VERL, sharded_state),
        (2, "model.rank_{rank}.pth", fsdp2_state),
        (2, "pytorch_model_rank{rank}.bin", sharded_state),
        (2, "rank-{rank}-of-{size}.ckpt", fsdp2_state),
    ],
)
def test_the_files_of_ranks_are_put_together(tmp_path: Path, ranks: int, name: str, state: Any) -> None:
    folder = save(tmp_path, ranks, name, state)
    assert detect_checkpoint_format(folder).name == "rank-files"
    assert model_names(folder) == ["main"]
    expected = make_net().state_dict()
    found = read(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in expected.items())


def test_other_strides_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 4, VERL, strided_otherwise)
    with pytest.raises(CheckpointError, match=r"body\.weight is no plain tensor: DTensor"):
        open_source(folder)


@pytest.mark.parametrize("name", ["model.rank_{rank}.pth", "pytorch_model_fsdp_0_rank{rank}.bin"])
def test_flat_parameters_are_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, 2, name, local_state)
    found = detect_checkpoint_format(folder)
    assert found.name == "unknown"
    assert "flat parameters" in found.reason
    assert "SHARDED_STATE_DICT" in found.reason
    with pytest.raises(CheckpointError, match="SHARDED_STATE_DICT"):
        open_source(folder)


def test_bare_local_parts_are_refused_and_never_joined(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save({"w": torch.ones(3 + rank, 2)}, tmp_path / f"model_rank_{rank}.pt")
    with pytest.raises(CheckpointError, match="local parts"):
        open_source(tmp_path)


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 3, VERL, fsdp2_state)
    (folder / VERL.format(size=3, rank=1)).unlink()
    with pytest.raises(IncompleteCheckpointError, match=r"2 of 3 files of ranks.*missing: ranks 1"):
        open_source(folder)


def test_the_last_rank_of_unnumbered_files_is_missed_by_the_holes(tmp_path: Path) -> None:
    folder = save(tmp_path, 3, "model.rank_{rank}.pth", fsdp2_state)
    (folder / "model.rank_2.pth").unlink()
    with pytest.raises(IncompleteCheckpointError, match="not all there"):
        open_source(folder)


def test_files_of_two_saves_are_not_mixed(tmp_path: Path) -> None:
    folder = save(tmp_path, 2, VERL, fsdp2_state)
    (folder / VERL.format(size=4, rank=0)).write_bytes((folder / VERL.format(size=2, rank=0)).read_bytes())
    with pytest.raises(IncompleteCheckpointError, match="several saves are mixed"):
        open_source(folder)


def run_odd_meshes(directory: Path) -> None:
    """A DTensor each, whose mesh says something else of its layout than torch does."""
    kinds: dict[str, Any] = {
        "whole": None,
        "numbers": (2,),
        "texts": ("shape",),
        "dicts": ({"shape": (1,)},),
        "dtensors": (DTensor,),
        "no shape": (_with(stride=(1,)),),
        "a shape that is a text": (_with(shape="1"),),
        "a shape below zero": (_with(shape=(-1,)),),
        "nothing": (_with(),),
    }
    for name, axes in kinds.items():
        mesh = init_device_mesh("cpu", (1,))
        if axes is not None:
            object.__setattr__(mesh._layout, "axes", axes)
        made = distribute_tensor(torch.arange(6.0).view(2, 3), init_device_mesh("cpu", (1,)), [Shard(0)])
        made._spec = replace(made._spec, mesh=mesh)
        torch.save({"w": made}, directory / f"{name}.pt")


def _with(**state: Any) -> Any:
    """An axis of a mesh with other attributes than it should have."""
    from torch.distributed._mesh_layout import _FlatLayout

    axis = object.__new__(_FlatLayout)
    for name, value in state.items():
        object.__setattr__(axis, name, value)
    return axis


def test_odd_layouts_of_a_mesh_are_errors_of_ours(tmp_path: Path) -> None:
    if not hasattr(pytest.importorskip("torch.distributed._mesh_layout"), "_FlatLayout"):
        pytest.skip("this torch pickles a mesh in another way")
    run_on_ranks(run_odd_meshes, 1, tmp_path, tmp_path)
    assert read_torch_file(tmp_path / "whole.pt").keys() == {("w",)}
    odd = [path for path in tmp_path.glob("*.pt") if path.name != "whole.pt"]
    assert len(odd) == 8
    for path in odd:
        with pytest.raises(CheckpointError):
            read_torch_file(path)
