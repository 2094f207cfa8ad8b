"""A run that was resumed passes steps once more that it had exported before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from shardsmith.errors import ShardsmithError
from shardsmith.hooks import HFExport, every


def export_once(directory: Path, model: nn.Module) -> None:
    hook = HFExport(directory, model=model, when=every(1))
    hook.on_step_end(1)
    hook.close()


def test_an_export_of_before_is_kept_and_does_not_stop_the_run(tmp_path: Path) -> None:
    export_once(tmp_path, nn.Linear(3, 3))
    before = (tmp_path / "step-1" / "model.safetensors").read_bytes()
    export_once(tmp_path, nn.Linear(3, 3))
    assert (tmp_path / "step-1" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_what_is_no_export_of_ours_is_an_error_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / "notes.txt").write_text("mine")
    with pytest.raises(ShardsmithError, match="step-1"):
        export_once(tmp_path, nn.Linear(3, 3, dtype=torch.float64))
    assert [path.name for path in (tmp_path / "step-1").iterdir()] == ["notes.txt"]
