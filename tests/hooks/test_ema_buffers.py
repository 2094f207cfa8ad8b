"""Buffers that are averaged like weights: against torch's own average, saved, resumed and exported."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from shardsmith.errors import MismatchError, UsageError
from shardsmith.hooks import EMA, HFExport, Hooks, ShardedSave, every
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

DECAY = 0.8


class Routed(nn.Module):
    """With buffers of every kind: moved in place, put in anew, not saved, and counted."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("expert_bias", torch.zeros(4))
        self.register_buffer("inv_freq", torch.arange(4.0), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.first(inputs)) + self.expert_bias
        if self.training:
            self.expert_bias = self.expert_bias + 0.01 * hidden.detach().mean(0)
        return hidden * self.inv_freq


BUFFERS = ["norm.running_mean", "norm.running_var", "expert_bias"]


def batch(step: int) -> Tensor:
    """The same on every rank."""
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(step))


def train_step(model: nn.Module, step: int) -> None:
    inputs = batch(step)
    (model(inputs) - inputs[:, :4]).square().mean().backward()  # of a normalized output alone it would be rounding
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    model.zero_grad()


def torchs_average(steps: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Routed()
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(DECAY), use_buffers=True)
    for step in range(1, steps + 1):
        train_step(model, step)
        average.update_parameters(model)  # a copy, the first time: our start_step=1
    return {name: value for name, value in average.module.state_dict().items() if value.is_floating_point()}


def assert_as_torchs(found: dict[str, Tensor], steps: int) -> None:
    expected = torchs_average(steps)
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_buffers_are_averaged_as_by_torch() -> None:
    torch.manual_seed(0)
    model = Routed()
    ema = EMA(model, decay=DECAY, start_step=1, buffers=True)
    for step in range(1, 6):
        train_step(model, step)
        ema.on_optimizer_step(step)
    found = ema.model_state_dict()
    assert found.keys() == torchs_average(1).keys()
    assert_as_torchs(found, 5)
    live = {name: value.clone() for name, value in model.state_dict().items()}
    with ema.swapped_in():
        assert all(torch.equal(model.state_dict()[name], found[name]) for name in found)
    assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())


def test_patterns_choose_among_the_buffers_and_must_fit() -> None:
    assert [n for n in EMA(Routed(), buffers=["*.running_*"]).model_state_dict() if n in BUFFERS] == BUFFERS[:2]
    assert not EMA(Routed()).model_state_dict().keys() & set(BUFFERS)
    with pytest.raises(UsageError, match=r"buffers=\['\*experts'\]: no floating-point buffer .* there: expert_bias"):
        EMA(Routed(), buffers=["*experts", "expert_bias"])
    with pytest.raises(UsageError, match=r"write \['expert_bias'\]"):
        EMA(Routed(), buffers="expert_bias")


def build(sharding: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = Routed()
    if sharding == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    if sharding == "ddp":
        return DistributedDataParallel(model)
    fully_shard(model)
    return model


def run(sharding: str, directory: Path, first: int, last: int) -> None:
    model = build(sharding)
    ema = EMA(model, decay=DECAY, start_step=1, buffers=True)
    save = ShardedSave(directory / "run", model=model, ema=ema, when=every(2))
    export = HFExport(directory / "hf", model=model, ema=ema, when=every(4), dtype="original")
    hooks = Hooks(ema, save, export)
    assert hooks.resume() == first
    for step in range(first + 1, last + 1):
        train_step(model, step)
        hooks.step(step)
    hooks.close()
    dist.barrier()


@pytest.mark.parametrize("sharding", ["fsdp2", "fsdp1", "ddp"])
def test_averaged_buffers_are_saved_resumed_and_exported(tmp_path: Path, sharding: str) -> None:
    run_on_ranks(run, 2, tmp_path, sharding, tmp_path, 0, 2)
    run_on_ranks(run, 2, tmp_path, sharding, tmp_path, 2, 4)
    assert_as_torchs(load_file(tmp_path / "hf" / "step-4" / "ema.safetensors"), 4)


def run_with_and_without(directory: Path) -> None:
    model = build("fsdp2")
    ema = EMA(model)
    save = ShardedSave(directory, model=model, ema=ema, when=every(1))
    save.save(1)
    save.close()
    more = ShardedSave(directory, model=model, ema=EMA(model, buffers=True), when=every(1))
    with pytest.raises(MismatchError, match=r"ema_model\.norm\.running_mean"):
        more.resume()
    assert more.resume(parts=["model"]) == 1
    more.close()


def test_an_average_without_buffers_is_not_taken_for_one_with_them(tmp_path: Path) -> None:
    run_on_ranks(run_with_and_without, 2, tmp_path, tmp_path / "run")


@pytest.mark.parametrize("buffers", [False, True])
def test_an_export_says_once_what_is_not_averaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, buffers: bool
) -> None:
    model = Routed()
    ema = EMA(model, buffers=buffers)
    export = HFExport(tmp_path / "hf", model=model, ema=ema, when=every(1))
    with caplog.at_level(logging.INFO, "shardsmith"):
        export.export(1)
        export.export(2)
        export.close()
    said = [line for line in caplog.messages if line.startswith("not averaged")]
    lines = [line for line in caplog.messages if line.startswith("exported")]
    assert ["of which the training waited" in line for line in lines] == [True, True]
    assert len(said) == (0 if buffers else 1)
    for line in said:
        assert all(name in line for name in BUFFERS)
        assert "num_batches_tracked" not in line
        assert "EMA(buffers=True)" in line
