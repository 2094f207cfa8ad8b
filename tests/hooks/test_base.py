"""``Hooks`` passes the moments on, in order and each as often as it should be."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardsmith.hooks import EMA, HFExport, Hook, Hooks, ShardedSave, every
from tests.ranks import run_on_ranks


class Noting(Hook):
    """Writes down what it is told."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name = name
        self.notes = notes

    def on_optimizer_step(self, step: int) -> None:
        self.notes.append(f"{self.name} optimizer {step}")

    def on_saved(self, step: int, path: Path) -> None:
        self.notes.append(f"{self.name} saved {step} {path}")

    def on_stop(self, step: int) -> None:
        self.notes.append(f"{self.name} stop {step}")

    def on_train_end(self, step: int) -> None:
        self.notes.append(f"{self.name} end {step}")

    def close(self) -> None:
        self.notes.append(f"{self.name} close")


@pytest.fixture
def notes() -> list[str]:
    return []


def test_a_hook_that_is_added_comes_after_the_others_and_hears_of_saves(notes: list[str]) -> None:
    late = Noting("late", notes)
    hooks = Hooks(Noting("first", notes))
    hooks.add(late)
    hooks.step(1)
    assert late.announce_saved is not None
    late.announce_saved(1, Path("a"))
    assert notes == ["first optimizer 1", "late optimizer 1", "first saved 1 a", "late saved 1 a"]
    assert hooks.steps_done == 1


def test_the_end_of_training_is_told_once(notes: list[str]) -> None:
    hooks = Hooks(Noting("one", notes))
    hooks.step(3)
    hooks.train_end(3)
    hooks.close()
    hooks.close()
    assert notes[1:] == ["one end 3", "one close"]


def test_a_training_that_is_broken_off_has_no_end(notes: list[str]) -> None:
    Hooks(Noting("one", notes)).close(broken_off=True)
    with pytest.raises(ZeroDivisionError), Hooks(Noting("two", notes)):
        raise ZeroDivisionError
    assert notes == ["one close", "two close"]


def run_quiet_steps(directory: Path) -> None:
    model = nn.Linear(4, 4)
    fully_shard(model)
    ema = EMA(model)
    save = ShardedSave(directory / "run", model=model, ema=ema, when=every(1000))
    hooks = Hooks(ema, save, HFExport(directory / "hf", model=model, ema=ema, when=every(1000)), stop_on=signal.SIGUSR1)
    hooks.step(hooks.resume() + 1)  # at which all ranks meet
    talks: list[str] = []

    def watch(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and isinstance(getattr(called, "__self__", None), dist.Store | dist.ProcessGroup):
            talks.append(called.__name__)
        if event == "call" and frame.f_code.co_filename == dist.distributed_c10d.__file__:
            talks.append(frame.f_code.co_name)

    sys.setprofile(watch)
    for step in range(2, 50):
        hooks.step(step)
    sys.setprofile(None)
    assert talks == []
    sys.setprofile(watch)
    dist.barrier()
    sys.setprofile(None)
    assert talks  # what the watch would have seen
    hooks.close()


def test_a_step_without_news_asks_no_store_and_runs_no_collective(tmp_path: Path) -> None:
    run_on_ranks(run_quiet_steps, 2, tmp_path, tmp_path)
