"""Training steps that are CUDA graphs: memory that is static, and captures that nothing may disturb."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from shardsmith.hooks import EMA, HFExport, Hooks, ShardedSave, every
from tests.gpu.devices import device
from tests.gpu.tensors import assert_same
from tests.gpu.test_runs import read_checkpoint

pytestmark = pytest.mark.gpu


def graphed_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> Callable[[], None]:
    """Forward, backward and optimizer as one graph. Model and optimizer are as before afterwards."""

    def step() -> None:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    state = [*model.parameters(), *(value for held in optimizer.state.values() for value in held.values())]
    kept = [value.detach().clone() for value in state]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    with torch.no_grad():
        for value, before in zip(state, kept, strict=True):
            value.copy_(before)
    return graph.replay


def run(directory: Path, steps: int) -> dict[int, dict[str, Tensor]]:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).to(device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, capturable=True)
    batch = torch.randn(8, 64, device=device())
    for parameter in model.parameters():  # so that the optimizer has its state before it is captured
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    ema = EMA(model, decay=0.9)
    save = ShardedSave(directory / "saves", model=model, optimizer=optimizer, ema=ema, when=every(3))
    hooks = Hooks(ema, save, HFExport(directory / "hf", model=model, ema=ema, when=every(1), dtype="original"))
    step = hooks.resume()
    replay = graphed_step(model, optimizer, batch)
    truth = {}
    while step < steps:
        batch.copy_(torch.randn(8, 64, generator=torch.Generator().manual_seed(step)))
        replay()
        step += 1
        truth[step] = {name: value.cpu() for name, value in model.state_dict().items()}
        hooks.step(step)
    hooks.close()
    return truth


def test_graphed_steps_are_saved_resumed_and_exported_bit_for_bit(tmp_path: Path) -> None:
    truth = run(tmp_path / "whole", 6)
    run(tmp_path / "resumed", 3)
    run(tmp_path / "resumed", 6)
    for step, weights in truth.items():
        assert_same(load_file(tmp_path / "whole" / "hf" / f"step-{step}" / "model.safetensors"), weights)
        assert_same(load_file(tmp_path / "resumed" / "hf" / f"step-{step}" / "model.safetensors"), weights)
    assert_same(*(read_checkpoint(tmp_path / name / "saves" / "step-6") for name in ("resumed", "whole")))


def test_a_graph_is_captured_while_an_export_and_a_save_are_written(tmp_path: Path, record_property: Any) -> None:
    """A call to the device from another thread would make the capture fail: it is global, as it is by default."""
    model = nn.ParameterList(torch.randn(1 << 20, 64, device=device()) for _ in range(4))  # 1 GiB: it takes a while
    export = HFExport(tmp_path / "hf", model=model, when=every(1))
    save = ShardedSave(tmp_path / "saves", model=model, when=every(1))
    values, captures = torch.zeros(1000, device=device()), 0
    for hook in (export, save):
        hook.on_step_end(1)
    saving = save.saving(1)
    while export.in_flight or not saving.done():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            values.add_(1)
        graph.replay()
        captures += 1
    export.close()
    save.close()
    record_property("graphs captured while an export and a save of 1 GiB were written", captures)
    assert captures
    assert int(values[0]) == captures
