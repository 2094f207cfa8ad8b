"""A verified initial load onto a device: what is right passes, and what is wrong there is found and named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from shardsmith.errors import InitialLoadError
from shardsmith.hooks import HFExport, Hooks, every
from shardsmith.load.load import load_initial, verify_loaded
from tests.gpu.devices import BOTH, device, is_on_accelerator, run_on_ranks
from tests.gpu.tensors import assert_same
from tests.gpu.test_staging import Kinds
from tests.gpu.training import Way, build


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Every kind of tensor, written by an export."""
    export = HFExport(tmp_path / "hf", model=Kinds(), when=every(1), dtype="original")
    hooks = Hooks(export)
    hooks.step(1)
    hooks.close()
    return tmp_path / "hf" / "step-1"


def blank() -> nn.Module:
    model = Kinds().to(device())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def test_a_load_onto_the_device_is_verified_and_bit_for_bit(source: Path) -> None:
    model = blank()
    report = load_initial(source, model=model)
    assert report.tensors == len(model.state_dict())
    assert_same({n: v.detach() for n, v in model.state_dict().items()}, Kinds().state_dict())


@pytest.mark.parametrize("name", ["wide", "brain", "strided", "single", "quantized.weight", "counts", "many.5"])
def test_one_element_that_is_wrong_on_the_device_is_found_and_named(source: Path, name: str) -> None:
    model = blank()
    load_initial(source, model=model)
    with torch.no_grad():
        values = model.state_dict()[name].reshape(-1) if name != "strided" else model.state_dict()[name].t().view(-1)
        values[-1:] = values[-1:].float().neg().add(3).to(values.dtype)
    with pytest.raises(InitialLoadError, match=name.replace(".", r"\.")) as raised:
        verify_loaded(model, source)
    assert [fault.split(":")[0] for fault in raised.value.codes] == ["values-differ"]


@pytest.mark.parametrize("sharding", ["fsdp2", "fsdp1"])
def test_a_load_into_a_sharded_model_is_verified(tmp_path: Path, sharding: str) -> None:
    run_on_ranks(run_sharded_load, 1, tmp_path, sharding, tmp_path, backend=BOTH if is_on_accelerator() else "gloo")


def run_sharded_load(sharding: str, directory: Path) -> None:
    way = Way(sharding=sharding)  # type: ignore[arg-type]  # it is one of them
    model = build(way)
    hooks = Hooks(HFExport(directory / "hf", model=model, when=every(1), dtype="original"))
    hooks.step(1)
    hooks.close()
    other = build(way)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(1)
    assert load_initial(directory / "hf" / "step-1", model=other).tensors >= 11
    with torch.no_grad():
        next(p for p in other.parameters() if p.numel()).mul_(2)
    with pytest.raises(InitialLoadError):
        verify_loaded(other, directory / "hf" / "step-1")
