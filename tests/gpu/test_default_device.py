"""``torch.set_default_device``: tensors that are made without a device are somewhere else then, but ours are not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from shardsmith.hooks import EMA, HFExport, Hooks, ShardedSave, every
from shardsmith.load.load import load_initial, verify_loaded
from tests.gpu.devices import device, is_on_accelerator
from tests.gpu.tensors import assert_same
from tests.gpu.test_staging import Kinds, read_save, spoil, truth_of


@pytest.fixture(autouse=True)
def elsewhere() -> Iterator[None]:
    """On a CPU the default device is one on which tensors have no values: whatever is made there by mistake is seen."""
    yield
    torch.set_default_device(None)


def move_default() -> None:
    torch.set_default_device(device() if is_on_accelerator() else "meta")


def test_runs_are_saved_exported_and_resumed(tmp_path: Path) -> None:
    model, other, truth = Kinds().to(device()), Kinds().to(device()), truth_of(Kinds())
    spoil(other)
    move_default()
    ema = EMA(model, decay=0.9)
    save = ShardedSave(tmp_path / "saves", model=model, ema=ema, when=every(1))
    hooks = Hooks(
        ema, save, HFExport(tmp_path / "hf", model=model, ema=ema, when=every(1), dtype="original", write_mode="files")
    )
    hooks.step(1)
    hooks.close()
    again = Hooks(ShardedSave(tmp_path / "saves", model=other, when=every(1)))
    assert again.resume() == 1
    again.close()
    torch.set_default_device(None)
    assert_same(load_file(tmp_path / "hf" / "step-1" / "model.safetensors"), truth)
    assert_same(read_save(tmp_path / "saves" / "step-1", truth), truth)
    assert_same(truth_of(other), truth)


def test_an_initial_load_is_verified(tmp_path: Path) -> None:
    model, other = Kinds().to(device()), Kinds().to(device())
    move_default()
    hooks = Hooks(HFExport(tmp_path / "hf", model=model, when=every(1), dtype="original"))
    hooks.step(1)
    hooks.close()
    report = load_initial(tmp_path / "hf" / "step-1", model=other)
    assert report.tensors == len(model.state_dict())
    verify_loaded(other, tmp_path / "hf" / "step-1", fresh=lambda: nn.Linear(2, 2))
    torch.set_default_device(None)
    assert_same(truth_of(other), truth_of(Kinds()))


def test_a_save_in_the_main_thread_is_resumed(tmp_path: Path) -> None:
    """The default device is that of a thread: a save in the background does not see it."""
    model = Kinds().to(device())
    move_default()
    Hooks(ShardedSave(tmp_path, model=model, when=every(1), async_mode="disabled")).step(1)
    spoil(model)
    assert Hooks(ShardedSave(tmp_path, model=model, when=every(1))).resume() == 1
    torch.set_default_device(None)
    assert_same(truth_of(model), truth_of(Kinds()))
