"""What fails while state is copied: it is said on every rank, nothing half-made stays, and the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from shardsmith.errors import RankFailedError
from shardsmith.hooks import HFExport, Hooks, ShardedSave, every
from tests.gpu.devices import device, run_on_ranks
from tests.gpu.tensors import assert_same

_IMPOSSIBLE = 1 << 41
"""Elements of a tensor of which no machine has room for a copy; itself it has one."""

Make = Callable[[Path, nn.Module], HFExport | ShardedSave]
HOOKS: dict[str, Make] = {
    "an export": lambda directory, model: HFExport(directory, model=model, when=every(1), dtype="original"),
    "a save": lambda directory, model: ShardedSave(directory, model=model, when=every(1)),
}


def small() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20)).to(device())


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("kind", HOOKS)
def test_too_little_memory_on_the_host_is_an_error_and_the_run_goes_on(tmp_path: Path, kind: str) -> None:
    model = small()
    model.register_parameter("vast", nn.Parameter(torch.zeros(1, device=device()).expand(_IMPOSSIBLE)))
    hook = HOOKS[kind](tmp_path, model)
    with pytest.raises((RuntimeError, MemoryError, OSError)):
        fail(hook)
    assert names(tmp_path) == []
    del model.vast
    again = HOOKS[kind](tmp_path, model)
    again.on_step_end(2)
    again.close()
    assert names(tmp_path) == ["step-2"]


def fail(hook: HFExport | ShardedSave) -> None:
    """At once or in the background, in whichever it is found."""
    try:
        hook.on_step_end(1)
    finally:
        hook.close()


def test_an_error_in_the_copy_of_one_rank_reaches_the_other_and_the_next_export_works(tmp_path: Path) -> None:
    run_on_ranks(run_failing_copy, 2, tmp_path, tmp_path / "hf")


def run_failing_copy(directory: Path) -> None:
    model = small()
    truth = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    hooks = Hooks(HFExport(directory, model=model, when=every(1), dtype="original"))
    hooks.step(1)
    kept = dict(model[0].named_parameters())
    if dist.get_rank() == 1:  # which writes some of what both ranks hold
        for name, value in kept.items():
            model[0]._parameters[name] = nn.Parameter(value.to("meta"))
    with pytest.raises(RankFailedError, match="rank 1"):
        hooks.step(2)
    model[0]._parameters.update(kept)
    hooks.step(3)
    hooks.close()
    assert names(directory) == ["step-1", "step-3"]
    assert_same(load_file(directory / "step-3" / "model.safetensors"), truth)


@pytest.mark.gpu
def test_a_kernel_that_failed_before_the_copy_is_an_error_on_both_ranks(tmp_path: Path) -> None:
    """The device of that process is of no use any more; the other rank must hear of it and not wait."""
    run_on_ranks(run_failed_kernel, 2, tmp_path, tmp_path / "hf")
    assert names(tmp_path / "hf") == []


def run_failed_kernel(directory: Path) -> None:
    model = small()
    hooks = Hooks(HFExport(directory, model=model, when=every(1), dtype="original", timeout_secs=30))
    if dist.get_rank() == 1:
        with torch.no_grad():
            beyond = torch.tensor([10**6], device=device())
            model[0].weight.index_fill_(0, beyond, 1.0)  # out of bounds: the device stops, and says so later
    with pytest.raises(RankFailedError, match="rank 1"):
        hooks.step(1)
