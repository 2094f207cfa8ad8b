from __future__ import annotations

import argparse
import json
import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

from shardsmith.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    UnsafeCheckpointError,
    UnsupportedFormatError,
)
from shardsmith.formats.by_path import detect_checkpoint_format, model_names, open_source
from shardsmith.formats.torch_files.files import read_torch_file
from shardsmith.ground.file_tensor import FileTensor
from shardsmith.tensors.tensors import Chunk, TensorSource, read_tensor
from tests.ranks import run_on_ranks
from tests.tensor_cases import raw_bytes

WEIGHTS = {
    "a.weight": torch.arange(6.0).view(2, 3),
    "a.scale": torch.tensor(7),
    "b.half": torch.randn(3, 5, dtype=torch.float64).bfloat16(),
    "b.turned": torch.arange(12).view(3, 4).t(),
    "b.part": torch.arange(40.0)[7:19],
    "b.none": torch.empty(0, 4),
    "b.mask": torch.tensor([True, False]),
    "b.small": torch.randn(4).to(torch.float8_e4m3fn),
}


def assert_holds(source: TensorSource, weights: dict[str, Tensor] = WEIGHTS) -> None:
    assert source.specs.keys() == weights.keys()
    for name, tensor in weights.items():
        found = read_tensor(source, name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert raw_bytes(found) == raw_bytes(tensor), name


WRAPPED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "flat": lambda weights: weights,
    "ordered": lambda weights: OrderedDict(weights),
    "parameters": lambda weights: {
        name: nn.Parameter(tensor, requires_grad=tensor.is_floating_point() and tensor.element_size() > 1)
        for name, tensor in weights.items()
    },
    "model": lambda weights: {"model": weights, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}, "step": 3},
    "state_dict": lambda weights: {"state_dict": OrderedDict(weights), "epoch": 2, "lr": 1e-3},
    "module": lambda weights: {"module": weights, "lr_scheduler": None},
}


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_a_file_gives_the_tensors_of_its_model(wrapping: str, tmp_path: Path) -> None:
    torch.save(WRAPPED[wrapping](WEIGHTS), tmp_path / "x.pt")
    assert detect_checkpoint_format(tmp_path / "x.pt").reason == "a .pt file of torch.save with main weights"
    assert_holds(open_source(tmp_path / "x.pt"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model_fsdp.bin"])
def test_a_directory_is_read_by_its_known_names(name: str, tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / name)
    found = detect_checkpoint_format(tmp_path)
    assert (found.name, found.reason) == ("torch", f"8 tensors in {name}")
    assert_holds(open_source(tmp_path))


def test_an_average_may_lie_beside_it(tmp_path: Path) -> None:
    torch.save({"model": WEIGHTS}, tmp_path / "model.pt")
    torch.save({"w": torch.ones(3)}, tmp_path / "ema.pt")
    assert model_names(tmp_path) == ["main", "ema"]
    assert_holds(open_source(tmp_path, "ema"), {"w": torch.ones(3)})


def test_tensors_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1 << 20), "v": torch.ones(3)}, tmp_path / "x.pt")
    held = read_torch_file(tmp_path / "x.pt")
    (_, values) = held[("w",)].parts[0]
    with (tmp_path / "x.pt").open("r+b") as file:
        file.seek(os.path.getsize(tmp_path / "x.pt") // 2)
        file.write(b"\0\0\x80\x3f" * 4)
    assert isinstance(values, FileTensor)
    assert float(values.whole().sum()) > 0


def test_a_file_from_before_the_zip_format_is_read(tmp_path: Path) -> None:
    weights = {name: tensor for name, tensor in WEIGHTS.items() if name != "b.small"}  # that format has no float8
    torch.save(weights, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    assert detect_checkpoint_format(tmp_path / "x.bin").name == "torch"
    assert_holds(open_source(tmp_path / "x.bin"), weights)


def test_a_file_whose_kinds_only_torch_knows_is_read_by_torch(tmp_path: Path) -> None:
    torch.save({"model": WEIGHTS, "args": {"size": torch.Size([3]), "set": {1, 2}}}, tmp_path / "x.pt")
    assert_holds(open_source(tmp_path / "x.pt"))


def write_indexed(directory: Path, **changes: str) -> dict[str, str]:
    halves = {f"pytorch_model-0000{i + 1}-of-00002.bin": list(WEIGHTS)[4 * i : 4 * i + 4] for i in range(2)}
    for file, names in halves.items():
        torch.save({name: WEIGHTS[name] for name in names}, directory / file)
    weight_map = {name: file for file, names in halves.items() for name in names} | changes
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_several_files_with_an_index_are_one_model(tmp_path: Path) -> None:
    write_indexed(tmp_path)
    assert detect_checkpoint_format(tmp_path).name == "torch"
    assert_holds(open_source(tmp_path))


@pytest.mark.parametrize("outside", ["../x.bin", "/etc/x.bin", "sub/x.bin", "x.safetensors", "C:\\x.bin", "x.bin/"])
def test_an_index_may_only_name_files_beside_it(outside: str, tmp_path: Path) -> None:
    write_indexed(tmp_path, **{"a.weight": outside})
    assert detect_checkpoint_format(tmp_path).name == "unknown"
    with pytest.raises(UnsupportedFormatError, match="names what is no bin file beside it; nothing was read"):
        open_source(tmp_path)


def test_an_index_that_contradicts_its_files_is_refused(tmp_path: Path) -> None:
    write_indexed(tmp_path, c="pytorch_model-00001-of-00002.bin")
    assert "contradicts" in detect_checkpoint_format(tmp_path).reason
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    assert "1 of 2 weight files are missing" in detect_checkpoint_format(tmp_path).reason
    with pytest.raises(IncompleteCheckpointError):
        open_source(tmp_path)


class Canary:
    """Runs code when it is unpickled the usual way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_of_a_file_is_run(zipped: bool, tmp_path: Path) -> None:
    hostile = {"model": {"w": torch.ones(3)}, "more": Canary(tmp_path / "ran")}
    torch.save(hostile, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafeCheckpointError, match="holds what is not read without running code"):
        read_torch_file(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


BESIDE: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace(lr=1e-3),
    "multiarray.scalar": numpy.float64(0.5),
    "pathlib.PosixPath": Path("x"),
    "datetime.timedelta": timedelta(1),
    "torch.nn.modules.linear.Linear": nn.Linear(2, 2),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_what_is_no_plain_value_beside_the_weights_is_named_and_the_advice_leads_to_a_file_that_is_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": WEIGHTS, "beside": BESIDE[kind]}, "x.pt")
    reason = detect_checkpoint_format("x.pt").reason
    assert kind in reason
    advice = reason.split("save the weights alone: ")[1].split(", and of")[0]
    names = {"torch": torch, "FILE": "x.pt", "KEY": "model", "NEW": "new.pt"}
    exec(advice, names)
    assert_holds(open_source("new.pt"))


@pytest.mark.parametrize("size", [0, 1, 3, 100, 1000, -1])
def test_a_truncated_file_is_never_read(size: int, tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "model.pt")
    os.truncate(tmp_path / "model.pt", size if size >= 0 else os.path.getsize(tmp_path / "model.pt") + size)
    assert detect_checkpoint_format(tmp_path).name == "incomplete"
    with pytest.raises((CorruptCheckpointError, IncompleteCheckpointError)):
        read_torch_file(tmp_path / "model.pt")


def test_a_member_that_is_gone_is_no_tensor(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "x.pt", "w") as part:
        for name in whole.namelist():
            if not name.endswith("data/0"):
                part.writestr(name, whole.read(name))
    with pytest.raises(CorruptCheckpointError):
        read_torch_file(tmp_path / "x.pt")


def test_two_keys_that_become_one_name_are_refused(tmp_path: Path) -> None:
    torch.save({"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(IncompleteCheckpointError, match="two of its keys are the same once they are joined"):
        open_source(tmp_path / "x.pt")


def test_special_tensors_are_named_and_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "x.pt")
    with pytest.raises(UnsupportedFormatError, match=r"w is no plain tensor: Tensor, torch\.sparse_coo, on cpu"):
        read_torch_file(tmp_path / "x.pt")


def test_a_file_without_a_model_is_said_to_have_none(tmp_path: Path) -> None:
    torch.save({"state": {0: {"exp_avg": torch.ones(3)}}, "optimizer": {"lr": 1.0}}, tmp_path / "x.pt")
    torch.save({"step": 3}, tmp_path / "scheduler.pt")
    assert detect_checkpoint_format(tmp_path / "scheduler.pt").reason == "a .pt file of torch.save with no weights"
    with pytest.raises(CheckpointNotFoundError, match="has no 'main' weights; it holds no model at all"):
        open_source(tmp_path / "scheduler.pt")


def run_flat(directory: Path) -> None:
    model = FullyShardedDataParallel(nn.Linear(5, 7), device_id=torch.device("cpu"))
    rank = torch.distributed.get_rank()
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.LOCAL_STATE_DICT):
        torch.save(model.state_dict(), directory / f"model_rank{rank:05d}.pt")
    facts = {"train_steps": 1, "world_size": 2, "checkpoint_type": "sharded"}
    (directory / "metadata.json").write_text(json.dumps(facts))


def test_flat_parameters_are_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "0000001").mkdir()
    run_on_ranks(run_flat, 2, tmp_path, tmp_path / "0000001")
    reason = detect_checkpoint_format(tmp_path / "0000001").reason
    assert "holds flat parameters (_flat_param), which do not say what they consist of; save with" in reason


def test_local_parts_that_do_not_say_where_they_belong_are_refused(tmp_path: Path) -> None:
    for rank, rows in enumerate((4, 3)):
        torch.save({"w": torch.ones(rows, 2)}, tmp_path / f"model_rank{rank:05d}.pt")
    facts = {"train_steps": 1, "world_size": 2, "checkpoint_type": "sharded"}
    (tmp_path / "metadata.json").write_text(json.dumps(facts))
    assert "these are local parts, and nothing says where they belong" in detect_checkpoint_format(tmp_path).reason


def test_boxes_are_read_without_the_rest(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "x.pt")
    box = Chunk((1, 1), (2, 2))
    ((part, values),) = open_source(tmp_path / "x.pt").pieces("b.turned", box)
    assert part == box
    assert torch.equal(values, WEIGHTS["b.turned"][1:3, 1:3])
