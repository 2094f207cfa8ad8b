"""Saves with staging="overlap" hold what those hold that copy at once, and what is changed meanwhile is an error."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from shardsmith.errors import RankFailedError, UsageError
from shardsmith.hooks import EMA, Hooks, ShardedSave, at, every
from shardsmith.manifest.checkpoints import committed_steps, find_damage
from shardsmith.manifest.metadata import read_metadata
from shardsmith.sharding import later_copy, staged_copy
from shardsmith.sharding.later_copy import LaterCopy
from tests.hooks.training import build
from tests.ranks import run_on_ranks

STEPS = 200
SAVED = sorted(random.Random(16).sample(range(1, STEPS), 24))


def train(directory: Path, sharding: str, **options: Any) -> None:
    """Two micro batches a step; the buffer counts in each forward, the schedule moves after the step."""
    model = build(sharding)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS + 1)
    ema = EMA(model, decay=0.9, start_step=10)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "ema": ema}
    save = ShardedSave(directory, when=at(*SAVED), **parts, **options)
    hooks = Hooks(ema, save)
    for step in range(1, STEPS + 1):
        for _ in range(2):
            tokens = torch.randint(11, (3, 4))
            (nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        hooks.step(step)
        if step in SAVED[::3]:
            with ema.swapped_in():  # an evaluation right after a save
                model(torch.zeros(1, 2, dtype=torch.int64))
    hooks.close()


@pytest.mark.parametrize("sharding", ["fsdp2", "fsdp1"])
def test_a_run_that_overlaps_equals_one_that_does_not(tmp_path: Path, sharding: str) -> None:
    run_on_ranks(train, 2, tmp_path, tmp_path / "copy", sharding)
    run_on_ranks(run_overlapped, 2, tmp_path, tmp_path / "overlap", sharding)
    assert committed_steps(tmp_path / "overlap") == SAVED
    for step in SAVED:
        one, other = (read_metadata(tmp_path / kind / f"step-{step}") for kind in ("copy", "overlap"))
        assert {key: record.digest for key, record in one.tensors.items()} == {
            key: record.digest for key, record in other.tensors.items()
        }
        assert one.ema == other.ema
        assert find_damage(tmp_path / "overlap" / f"step-{step}") == []


def run_overlapped(directory: Path, sharding: str) -> None:
    later_copy._BATCH_BYTES = 256  # so that both threads have something to copy
    train(directory, sharding, staging="overlap")


def plain_change(parameter: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.add_(1.0)


def change_of_data(parameter: torch.Tensor) -> None:
    parameter.data.mul_(2.0)


def change_of_the_shard(parameter: torch.Tensor) -> None:
    assert isinstance(parameter, DTensor)
    parameter.to_local().detach().fill_(7.0)


CHANGES = {"in place": plain_change, "through data": change_of_data, "of the shard": change_of_the_shard}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_parameter_that_is_changed_by_hand_is_an_error_that_names_it_on_all_ranks(tmp_path: Path, kind: str) -> None:
    run_on_ranks(run_changed, 2, tmp_path, tmp_path / "run", CHANGES[kind])


def run_changed(directory: Path, change: Callable[[torch.Tensor], None]) -> None:
    logging.disable()
    changed, copy = threading.Event(), LaterCopy.copy

    def copy_after_the_change(self: LaterCopy) -> None:
        assert changed.wait(60)
        copy(self)

    LaterCopy.copy = copy_after_the_change  # type: ignore[method-assign]
    model = build("fsdp2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    save = ShardedSave(directory, model=model, optimizer=optimizer, when=every(1), staging="overlap")
    model(torch.zeros(1, 2, dtype=torch.int64)).sum().backward()
    optimizer.step()
    save.save(1)
    if dist.get_rank() == 1:
        change(model.norm.weight)
    changed.set()
    optimizer.step()
    with pytest.raises(RankFailedError) as error:
        save.save(2)
    assert "1 tensors were changed before the next optimizer.step()" in str(error.value)
    assert "norm.weight" in str(error.value)
    assert 'staging="copy"' in str(error.value)
    save.save(3)
    save.close()
    assert committed_steps(directory) == [3]


def test_moments_and_averages_are_guarded_too(tmp_path: Path) -> None:
    model = build("none")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ema = EMA(model)
    save = ShardedSave(tmp_path, model=model, optimizer=optimizer, ema=ema, when=every(1), staging="overlap")
    model(torch.zeros(1, 2, dtype=torch.int64)).sum().backward()
    optimizer.step()
    save.save(1)
    optimizer.state[model.norm.bias]["exp_avg"].zero_()
    ema.model_state_dict()["norm.bias"].add_(1)
    with pytest.raises(UsageError, match=r"2 tensors(.|\n)*ema_model.norm.bias") as error:
        save.close()
    assert "optimizer.state.norm.bias.exp_avg" in str(error.value)
    assert committed_steps(tmp_path) == []


def test_small_tensors_are_saved_as_they_were_whatever_becomes_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged_copy, "SMALL_BYTES", 32 << 10)
    model = nn.ParameterDict({"small": torch.ones(1000), "large": torch.ones(1 << 20)})
    optimizer = torch.optim.AdamW(model.parameters())
    save = ShardedSave(tmp_path, model=model, optimizer=optimizer, when=every(1), staging="overlap")
    save.save(1)
    plain_change(model["small"])
    assert save.saving(1).result() == tmp_path / "step-1"
    save.load(tmp_path / "step-1")
    assert torch.equal(model["small"], torch.ones(1000))
    save.save(2)
    plain_change(model["large"])
    with pytest.raises(UsageError, match=r"1 tensors(.|\n)*large"):
        save.close()


def test_the_average_may_be_updated_by_hand_after_the_save(tmp_path: Path) -> None:
    model = build("none")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ema = EMA(model, decay=0.5)
    save = ShardedSave(tmp_path, model=model, optimizer=optimizer, ema=ema, when=every(1), staging="overlap")
    before = {name: tensor.clone() for name, tensor in ema.model_state_dict().items()}
    with torch.no_grad():
        model.norm.weight.add_(1)
    save.save(1)
    ema.update()
    assert save.saving(1).result() == tmp_path / "step-1"
    save.load(tmp_path / "step-1")
    assert all(torch.equal(tensor, before[name]) for name, tensor in ema.model_state_dict().items())
    save.close()


def test_overlap_needs_an_optimizer_and_a_background(tmp_path: Path) -> None:
    model = build("none")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for options in ({}, {"optimizer": optimizer, "async_mode": "disabled"}):
        with pytest.raises(UsageError, match=r"needs optimizer=\.\.\. and async_mode"):
            ShardedSave(tmp_path, model=model, when=every(1), staging="overlap", **options)


PROGRAM = """
import sys, torch
from shardsmith.hooks import ShardedSave, every
model = torch.nn.Linear(50, 50)
optimizer = torch.optim.AdamW(model.parameters())
save = ShardedSave(sys.argv[1], model=model, optimizer=optimizer, when=every(1), staging="overlap")
save.save(1)
"""


def test_a_process_that_ends_without_close_commits_its_last_save(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "run")], check=True, timeout=100)
    assert committed_steps(tmp_path / "run") == [1]
