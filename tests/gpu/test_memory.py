"""Memory that hooks take on a device and pin on the host, and what they give back."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardsmith.hooks import EMA, HFExport, Hooks, ShardedSave, every
from tests.gpu.devices import device

pytestmark = pytest.mark.gpu
_MIB = 1 << 20
_WINDOW = 256 * _MIB
"""What the casts of an export may take on the device, however large the shard is."""


def weights(mebibytes: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    rows = mebibytes * _MIB // 4096 // dtype.itemsize // 8
    return nn.ParameterList(torch.randn(rows, 4096, device=device(), dtype=dtype) for _ in range(8))


def pinned_bytes() -> int:
    return int(torch.cuda.host_memory_stats()["allocated_bytes.current"])


def test_fifty_exports_and_saves_take_no_more_device_memory_than_two(tmp_path: Path) -> None:
    model = weights(16)
    ema = EMA(model, decay=0.5)
    export = HFExport(tmp_path / "hf", model=model, ema=ema, when=every(1))
    save = ShardedSave(tmp_path / "saves", model=model, ema=ema, when=every(10))
    hooks = Hooks(ema, save, export)
    taken = []
    for step in range(1, 51):
        hooks.step(step)
        export.wait()
        taken.append((torch.accelerator.memory_allocated(), torch.accelerator.memory_reserved()))
    hooks.close()
    assert taken[-1] <= taken[11], taken


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_casts_of_an_export_fit_a_window_on_the_device(tmp_path: Path, dtype: str, record_property: Any) -> None:
    model = weights(1024)
    export = HFExport(tmp_path, model=model, when=every(1), dtype=dtype)
    torch.accelerator.synchronize()
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    export.on_step_end(1)
    taken = torch.accelerator.max_memory_allocated() - before
    export.close()
    record_property(f"device memory of an export of 1 GiB as {dtype}, MiB", round(taken / _MIB))
    assert taken <= _WINDOW


def test_pinned_memory_is_given_back_when_the_hooks_are_closed(tmp_path: Path, record_property: Any) -> None:
    torch.accelerator.synchronize()
    torch._C._host_emptyCache()
    before = pinned_bytes()
    model = weights(48)
    hooks = Hooks(
        ShardedSave(tmp_path / "saves", model=model, when=every(1)),
        HFExport(tmp_path / "hf", model=model, when=every(1)),
    )
    hooks.step(1)
    record_property("pinned for a save of 48 MiB and an export of 24 MiB, MiB", round((pinned_bytes() - before) / _MIB))
    assert pinned_bytes() > before
    hooks.close()
    gc.collect()
    assert pinned_bytes() <= before
