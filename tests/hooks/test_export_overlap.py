"""Exports with staging="overlap" hold what those hold that copy at once, and what is changed meanwhile is an error."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardsmith.errors import RankFailedError
from shardsmith.ground.layout import PROVENANCE_FILE
from shardsmith.hooks import EMA, HFExport, Hooks, at, every
from shardsmith.manifest.checkpoints import committed_steps
from shardsmith.sharding import later_copy
from tests.hooks.training import build
from tests.ranks import run_on_ranks

EXPORTED = [3, 4, 9, 14]


@pytest.mark.parametrize("sharding", ["fsdp2", "fsdp1", "ddp"])
def test_an_export_that_overlaps_equals_one_that_does_not(tmp_path: Path, sharding: str) -> None:
    run_on_ranks(run_both, 2, tmp_path, tmp_path, sharding)
    for step in EXPORTED:
        one, other = (tmp_path / staging / f"step-{step}" for staging in ("copy", "overlap"))
        for name in ("model.safetensors", "ema.safetensors"):
            assert (one / name).read_bytes() == (other / name).read_bytes()


def run_both(directory: Path, sharding: str) -> None:
    """Two micro batches a step; the buffer counts in each forward; an export of two steps in a row."""
    later_copy._BATCH_BYTES = 256  # so that both threads have something to copy
    model = build(sharding)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ema = EMA(model, decay=0.9, start_step=5)
    options: dict[str, Any] = {"model": model, "ema": ema, "when": at(*EXPORTED)}
    exports = [HFExport(directory / staging, staging=staging, **options) for staging in ("copy", "overlap")]
    assert [export._copy.is_wanted for export in exports] == [False, True]
    hooks = Hooks(ema, *exports)
    for step in range(1, EXPORTED[-1] + 1):
        for _ in range(2):
            tokens = torch.randint(11, (3, 4))
            (nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        hooks.step(step)
    hooks.close()


def test_weights_that_are_changed_by_hand_are_an_error_that_names_them_on_all_ranks(tmp_path: Path) -> None:
    run_on_ranks(run_changed, 2, tmp_path, tmp_path / "run")


def run_changed(directory: Path) -> None:
    logging.disable()
    model = build("fsdp2")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    ema = EMA(model)
    export = HFExport(directory, model=model, ema=ema, when=every(1), staging="overlap")
    model(torch.zeros(1, 2, dtype=torch.int64)).sum().backward()
    for step, change in enumerate((model.norm.weight.data.mul_, ema.model_state_dict()["norm.bias"].add_), 1):
        export.export(step)
        if dist.get_rank() == 1:
            change(2.0)
        optimizer.step()
        with pytest.raises(RankFailedError) as error:
            export.wait()
        assert "1 tensors were changed before the next optimizer.step()" in str(error.value)
        assert ("norm.weight" if step == 1 else "ema.norm.bias") in str(error.value)
    export.export(3)
    export.close()
    assert committed_steps(directory, PROVENANCE_FILE) == [3]
    optimizer.step()
