"""Saves and exports that are due by time, by a signal or by a file: on all ranks after the same step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardsmith.errors import UsageError
from shardsmith.hooks import HFExport, Hooks, Schedule, ShardedSave, at_file, at_signal, every, last, minutes
from shardsmith.manifest.checkpoints import committed_steps, find_damage
from shardsmith.manifest.metadata import read_metadata
from tests.ranks import run_on_ranks

SOON = 1e-4  # minutes: 6 ms


def run_until_saved(hooks: Hooks, directory: Path, mark: str = "metadata.json", limit: int = 10**6) -> int:
    """Steps without work until something was saved; the step after which the loop ended."""
    step = hooks.resume()
    while not committed_steps(directory, mark):
        step += 1
        assert step < limit
        hooks.step(step)
    return step


def test_a_save_is_due_whenever_the_minutes_have_gone_by(tmp_path: Path) -> None:
    with Hooks(ShardedSave(tmp_path, model=nn.Linear(2, 2), when=minutes(SOON), async_mode="disabled")) as hooks:
        step = run_until_saved(hooks, tmp_path)
        assert committed_steps(tmp_path) == [step]
        while committed_steps(tmp_path) == [step]:
            hooks.step(hooks.steps_done + 1)
    assert len(committed_steps(tmp_path)) == 2
    with Hooks(ShardedSave(tmp_path / "rarely", model=nn.Linear(2, 2), when=minutes(60))) as hooks:
        for step in range(1, 1000):
            hooks.step(step)
    assert committed_steps(tmp_path / "rarely") == []


def test_a_file_is_an_order_to_save_and_is_gone_then(tmp_path: Path) -> None:
    order = tmp_path / "save-now"
    save = ShardedSave(
        tmp_path / "steps", model=nn.Linear(2, 2), when=every(10**9) | at_file(order), async_mode="disabled"
    )
    with Hooks(save) as hooks:
        for step in range(1, 100):
            hooks.step(step)
        assert committed_steps(tmp_path / "steps") == []
        order.touch()
        while not committed_steps(tmp_path / "steps"):
            hooks.step(hooks.steps_done + 1)
        assert not order.exists()
        for _ in range(100):
            hooks.step(hooks.steps_done + 1)
    assert len(committed_steps(tmp_path / "steps")) == 1


def test_a_signal_saves_and_exports_the_step_and_the_run_goes_on(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    model, when = nn.Linear(2, 2), at_signal()
    save = ShardedSave(tmp_path / "steps", model=model, when=when | every(4))
    with Hooks(save, HFExport(tmp_path / "hf", model=model, when=when)) as hooks:
        for step in range(1, 9):
            if step in (3, 8):  # step 8 is saved anyway, and not twice
                os.kill(os.getpid(), signal.SIGUSR1)
            hooks.step(step)
        assert not hooks.should_stop
    assert committed_steps(tmp_path / "steps") == [3, 4, 8]
    assert committed_steps(tmp_path / "hf", "shardsmith.json") == [3, 8]
    assert signal.getsignal(signal.SIGUSR1) is before


def run_ordered(directory: Path, kind: str) -> None:
    """Rank 1 gets the signal; rank 0 has the clock and sees the file."""
    model = nn.Linear(8, 8)
    fully_shard(model)
    order = directory / "order"
    when = {"signal": at_signal(signal.SIGUSR2), "minutes": minutes(SOON), "file": at_file(order)}[kind]
    save = ShardedSave(directory / "steps", model=model, when=when, async_mode="disabled")
    with Hooks(save) as hooks:
        for step in range(1, 10**6):
            if step == 5 and dist.get_rank() == 1:
                order.touch()
                os.kill(os.getpid(), signal.SIGUSR2) if kind == "signal" else None
            hooks.step(step)
            done: list[Any] = [bool(committed_steps(directory / "steps"))]
            dist.broadcast_object_list(done)  # ranks of a training go together, too
            if done[0]:
                break


@pytest.mark.parametrize("kind", ["signal", "minutes", "file"])
def test_all_ranks_save_after_the_same_step(kind: str, tmp_path: Path) -> None:
    run_on_ranks(run_ordered, 2, tmp_path, tmp_path, kind)
    (step,) = committed_steps(tmp_path / "steps")[:1]
    assert step >= (5 if kind != "minutes" else 1)
    path = tmp_path / "steps" / f"step-{step}"
    assert find_damage(path) == []
    assert read_metadata(path).world_size == 2


SCRIPT = """
import sys
from torch import nn
from shardsmith.hooks import Hooks, ShardedSave, at_signal
with Hooks(ShardedSave(sys.argv[1], model=nn.Linear(2, 2), when=at_signal(), async_mode="disabled")) as hooks:
    print("ready", flush=True)
    step = 0
    while not hooks.hooks[0]._saved_step:
        step += 1
        hooks.step(step)
"""


def test_a_user_sends_the_signal_with_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        assert process.wait() == 0
    assert len(committed_steps(tmp_path)) == 1


def test_occasions_are_values_like_the_rest_of_a_schedule() -> None:
    schedule = every(500) | minutes(30) | at_signal(signal.SIGUSR2) | at_file("/run/save-now") | last()
    text = "every(500) | at_file('/run/save-now') | at_signal(signal.SIGUSR2) | minutes(30) | last()"
    assert repr(schedule) == text
    assert eval(text) == schedule
    assert schedule.outside(every(500) | last()) == minutes(30) | at_signal(signal.SIGUSR2) | at_file("/run/save-now")
    assert (minutes(30) | every(2)).outside(minutes(30) | every(2)) is None


REFUSED: dict[str, Callable[[], Schedule]] = {
    "no time": lambda: minutes(0),
    "a time that goes back": lambda: minutes(-1),
    "text": lambda: minutes("30 min"),  # type: ignore[arg-type]
    "no signal": lambda: at_signal("USR1x"),  # type: ignore[arg-type]
    "a URL": lambda: at_file("s3://bucket/now"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_sense_is_refused(what: str) -> None:
    with pytest.raises(UsageError):
        REFUSED[what]()
