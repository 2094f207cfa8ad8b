"""What is saved, exported and averaged is what the weights were when the hooks were called, on every stream.

Work that changes the weights is still waiting on the device when the hooks are called, and they are overwritten as soon
as the hooks return.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn

from shardsmith.hooks import EMA, HFExport, Hooks, ShardedSave, every
from tests.gpu.devices import delay_stream, device, other_stream
from tests.gpu.tensors import assert_same, is_same

STREAMS = {"the default stream": contextlib.nullcontext, "another stream": other_stream}
_FLOAT8 = torch.float8_e4m3fn


class Kinds(nn.Module):
    """Weights of every kind that trains, and beside them what is only kept. About 2 MB."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.wide = nn.Parameter(torch.randn(701, 311, generator=generator))
        self.brain = nn.Parameter(torch.randn(400, 129, generator=generator).bfloat16())
        self.strided = nn.Parameter(torch.randn(96, 1000, generator=generator).t())
        self.single = nn.Parameter(torch.randn((), generator=generator))
        self.quantized = nn.Module()  # of its own: what is beside it in a module passes for its scales
        values = torch.randn(65, 33, generator=generator).to(_FLOAT8)
        self.quantized.weight = nn.Parameter(values, requires_grad=False)
        self.register_buffer("flags", torch.arange(77) % 3 == 0)
        self.register_buffer("counts", torch.arange(1001))
        self.many = nn.ParameterList(torch.randn(i % 9, 3, generator=generator) for i in range(200))


@torch.no_grad()
def change(model: nn.Module, step: int) -> None:
    """Put a change of all weights behind other work on the current stream."""
    delay_stream()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.mul_(1.25).add_(step)


@torch.no_grad()
def spoil(model: nn.Module) -> None:
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.zero_()


def truth_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def read_save(directory: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Through torch's own reader."""
    state = {name: torch.empty_like(value) for name, value in like.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=directory, no_dist=True)
    return state


@pytest.mark.parametrize("stream", STREAMS)
def test_a_save_and_an_export_hold_the_weights_of_the_call(tmp_path: Path, stream: str) -> None:
    model = Kinds().to(device())
    save = ShardedSave(tmp_path / "saves", model=model, when=every(1))
    export = HFExport(tmp_path / "exports", model=model, when=every(1), dtype="original")
    hooks = Hooks(save, export)
    expected = []
    for step in (1, 2, 3):  # buffers are used again
        twin = Kinds()
        change(twin, step)
        expected.append(truth_of(twin))
        with STREAMS[stream]():
            load_state(model, Kinds())
            change(model, step)
            hooks.step(step)
            spoil(model)
    hooks.close()
    for step, truth in enumerate(expected, 1):
        assert_same(read_save(tmp_path / "saves" / f"step-{step}", truth), truth)
        found = load_file(tmp_path / "exports" / f"step-{step}" / "model.safetensors")
        assert_same(found, {name: truth[name] for name in truth if name in found})
        assert found.keys() == truth.keys()


@torch.no_grad()
def load_state(model: nn.Module, other: nn.Module) -> None:
    for one, value in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        one.copy_(value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_cast_on_the_way_is_that_of_torch(tmp_path: Path, dtype: str) -> None:
    model = Kinds().to(device())
    export = HFExport(tmp_path, model=model, when=every(1), dtype=dtype)
    Hooks(export).step(1)
    spoil(model)
    export.close()
    found = load_file(tmp_path / "step-1" / "model.safetensors")
    for name, value in Kinds().state_dict().items():
        is_cast = value.is_floating_point() and value.dtype != _FLOAT8  # which means nothing without its scales
        wanted = value.to(getattr(torch, dtype)) if is_cast else value
        assert is_same(found[name], wanted), name


@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "offloaded"])
@pytest.mark.parametrize("stream", STREAMS)
def test_an_average_follows_the_formula(offload: bool, stream: str) -> None:
    model = Kinds().to(device())
    ema = EMA(model, decay=0.75, offload=offload)
    places = {value.device.type for value in ema.model_state_dict().values()}
    assert places == ({"cpu"} if offload else {device().type})
    expected = {name: value.double() for name, value in truth_of(model).items() if name in ema.model_state_dict()}
    with STREAMS[stream]():
        for step in (1, 2, 3):
            change(model, step)
            ema.on_optimizer_step(step)
            now = truth_of(model)
            expected = {name: 0.75 * value + 0.25 * now[name].double() for name, value in expected.items()}
        spoil(model)
    for name, average in ema.model_state_dict().items():
        torch.testing.assert_close(average.cpu().double(), expected[name], rtol=1e-6, atol=1e-6)


def test_an_average_on_the_device_and_one_that_is_offloaded_are_saved_alike(tmp_path: Path) -> None:
    found = []
    for offload in (False, True):
        model = Kinds().to(device())
        ema = EMA(model, decay=0.75, offload=offload)
        export = HFExport(tmp_path / str(offload), model=model, ema=ema, when=every(1), dtype="bfloat16")
        hooks = Hooks(ema, export)
        change(model, 1)
        hooks.step(1)
        hooks.close()
        found.append(load_file(tmp_path / str(offload) / "step-1" / "ema.safetensors"))
    close: Callable[[Tensor, Tensor], None] = torch.testing.assert_close
    for name, value in found[0].items():
        close(found[1][name].double(), value.double(), rtol=1e-2, atol=1e-2)
