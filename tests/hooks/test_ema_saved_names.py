"""The average of a model that saves other tensors than it trains, as TorchTitan's fused projections do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate

from shardsmith.formats.safetensors_files.source import open_safetensors_directory
from shardsmith.hooks import EMA, HFExport, at
from shardsmith.tensors.tensors import read_tensor
from tests.ranks import run_on_ranks

NAMES = ["pair.left", "pair.right", "out.weight"]


class Pair(nn.Module):
    """Two matrices in one parameter; its checkpoints have them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.arange(24.0).view(6, 4))
        self.register_state_dict_post_hook(self._split)
        self.register_load_state_dict_pre_hook(self._join)

    @staticmethod
    def _split(_: nn.Module, state: dict[str, Tensor], prefix: str, __: Any) -> None:
        state[f"{prefix}left"], state[f"{prefix}right"] = whole(state.pop(f"{prefix}both")).chunk(2)

    @staticmethod
    def _join(_: nn.Module, state: dict[str, Tensor], prefix: str, *__: Any) -> None:
        state[f"{prefix}both"] = torch.cat([whole(state.pop(f"{prefix}{side}")) for side in ("left", "right")])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()
        self.out = nn.Linear(4, 1, bias=False)
        nn.init.ones_(self.out.weight)
        self.frozen = nn.Linear(4, 1, bias=False).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(4))

    def move(self, by: float) -> None:
        with torch.no_grad():
            for parameter in (self.pair.both, self.out.weight):
                parameter.add_(by)


def whole(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.redistribute(tensor.device_mesh, [Replicate()] * tensor.device_mesh.ndim)
    return tensor


def sharded(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def expected(moved: float) -> dict[str, Tensor]:
    both = torch.arange(24.0).view(6, 4) + moved
    return {"pair.left": both[:3], "pair.right": both[3:], "out.weight": torch.ones(1, 4) + moved}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    plain = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}
    torch.testing.assert_close(plain, wanted, rtol=0, atol=0)


def test_the_average_bears_the_names_of_the_checkpoint() -> None:
    model = Net()
    ema = EMA(model, decay=0.5)
    model.move(2)
    ema.update()
    assert list(ema.model_state_dict()) == NAMES
    assert_equal(ema.model_state_dict(), expected(1))
    assert_equal({name: model.state_dict()[name] for name in NAMES}, expected(2))  # untouched


def test_half_precision_weights_do_not_round_it() -> None:
    model = Net().bfloat16()
    ema = EMA(model, decay=0.5)
    model.move(0.5)  # 23.5 + 0.5 is exact, its average 23.25 is not
    ema.update()
    assert_equal(ema.model_state_dict(), expected(0.25))


def run_save_and_export(path: Path) -> None:
    model = sharded()
    ema = EMA(model, decay=0.5)
    export = HFExport(path / "hf", model=model, ema=ema, when=at(1), dtype="float32", names="identity")
    model.move(2)
    ema.update()
    dcp.save({"ema": ema}, checkpoint_id=path / "saved")
    export.export(1)
    export.close()


def run_load(path: Path) -> None:
    ema = EMA(sharded(seed=1), decay=0.5)
    state = {"ema": ema}
    dcp.load(state, checkpoint_id=path / "saved")
    assert_equal(ema.model_state_dict(), expected(1))
    assert ema.updates == 1


@pytest.mark.parametrize("ranks", [1, 4])
def test_it_is_saved_exported_and_loaded_on_other_ranks(tmp_path: Path, ranks: int) -> None:
    run_on_ranks(run_save_and_export, 2, tmp_path, tmp_path)
    run_on_ranks(run_load, ranks, tmp_path, tmp_path)
    for stem, moved in (("model", 2), ("ema", 1)):
        source = open_safetensors_directory(tmp_path / "hf" / "step-1", stem)
        assert {*NAMES, "frozen.weight", "mean"} == source.specs.keys()
        assert_equal({name: read_tensor(source, name) for name in NAMES}, expected(moved))
