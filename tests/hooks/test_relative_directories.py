"""A run with relative directories goes on where it began, wherever the script changes to meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from shardsmith.hooks import HFExport, Hooks, ShardedSave, every, latest
from shardsmith.manifest.checkpoints import committed_steps


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)


def hooks_of(model: nn.Module) -> Hooks:
    optimizer = torch.optim.AdamW(model.parameters())
    save = ShardedSave("run/checkpoints", model=model, optimizer=optimizer, when=every(1), keep=latest(2))
    return Hooks(save, HFExport("run/hf", model=model, when=every(1)))


def test_a_change_of_directory_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with hooks_of(nn.Linear(2, 2)) as hooks:
        for step in (1, 2, 3):
            hooks.step(step)
            monkeypatch.chdir(tmp_path / "elsewhere")  # the save may be in flight
    assert not [*(tmp_path / "elsewhere").iterdir()]
    assert committed_steps(tmp_path / "run" / "checkpoints") == [2, 3]
    assert [path.name for path in sorted((tmp_path / "run" / "hf").iterdir())] == ["step-1", "step-2", "step-3"]
    assert f"saved {tmp_path}/run/checkpoints/step-3" in caplog.text


def test_paths_are_shown_as_they_are_typed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with hooks_of(nn.Linear(2, 2)) as hooks:
        hooks.step(1)
    assert hooks_of(nn.Linear(2, 2)).resume() == 1
    assert "saved run/checkpoints/step-1: " in caplog.text
    assert "exported run/hf/step-1: " in caplog.text
    assert "resumed from run/checkpoints/step-1: " in caplog.text
