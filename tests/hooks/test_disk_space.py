"""What is done when the disk runs full: a small disk is pretended, on which the run's own files take the space."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardsmith.errors import UsageError
from shardsmith.hooks import (
    Event,
    HFExport,
    Hooks,
    Retention,
    ShardedSave,
    best,
    every,
    keep_if,
    latest,
    low_disk,
    multiples_of,
)
from shardsmith.hooks.disk_space import refuse_without_disk
from shardsmith.manifest.checkpoints import committed_steps
from tests.ranks import run_on_ranks

SIZE = 400_000
"""Of the values in a checkpoint, in bytes."""


def small_disk(patch: pytest.MonkeyPatch, directory: Path, capacity: int) -> None:
    patch.setattr("shardsmith.hooks.disk_space.free_bytes", lambda _: max(0, capacity - taken(directory)))


def taken(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def train(directory: Path, keep: Retention | None, steps: int = 6, **options: object) -> tuple[list[int], list[Event]]:
    events: list[Event] = []
    save = ShardedSave(directory, model=nn.Linear(1000, 100, bias=False), when=every(1), keep=keep, **options)  # type: ignore[arg-type]
    with Hooks(save, on_event=events.append) as hooks:
        for step in range(hooks.resume() + 1, steps + 1):
            hooks.step(step)
            hooks.metric(step, loss=float(step))
            if hooks.should_stop:
                break
    return committed_steps(directory), events


THINNED = {
    "nothing else": (low_disk(SIZE * 5 // 4, "thin_out"), [5, 6]),
    "the newest": (latest(4) | low_disk(SIZE * 5 // 4, "thin_out"), [5, 6]),
    "fewer than there is room for": (latest(1) | low_disk(SIZE * 5 // 4, "thin_out"), [6]),
    "milestones stay": (multiples_of(2) | low_disk(SIZE * 5 // 4, "thin_out"), [2, 4, 6]),
    "the best stays": (latest(3) | best("loss") | low_disk(SIZE * 5 // 4, "thin_out"), [1, 6]),
    "what is spared": (keep_if(lambda step: step == 3) | latest(4) | low_disk(SIZE * 5 // 4, "thin_out"), [3, 6]),
}
"""On a disk with room for three and a half, of which one and a quarter are to be free."""


@pytest.mark.parametrize("what", THINNED)
def test_the_oldest_go_until_there_is_room(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep, left = THINNED[what]
    small_disk(monkeypatch, tmp_path, SIZE * 7 // 2)
    steps, events = train(tmp_path, keep, async_mode="disabled")
    assert steps == left
    assert [event.step for event in events if event.kind == "remove"] == sorted(set(range(1, 7)) - set(left))
    assert any(event.kind == "low_disk" for event in events) == (what == "milestones stay")


@pytest.mark.parametrize("async_mode", ["async", "disabled"])
def test_the_run_ends_with_the_step_saved(
    async_mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small_disk(monkeypatch, tmp_path, SIZE * 9 // 2)
    keep = low_disk(SIZE * 2, "stop") | low_disk(SIZE * 3, "warn")
    with caplog.at_level(logging.WARNING):
        steps, events = train(tmp_path, keep, 100, async_mode=async_mode)
    assert steps == list(range(1, len(steps) + 1))
    assert 3 <= len(steps) <= 5  # in the background it is known a step later
    low = [event for event in events if event.kind == "low_disk"]
    assert low[0].step == 2
    assert 0 < low[0].nbytes < SIZE * 3
    assert low[0].error == f"{low[0].nbytes / 1e3:.2f} kB free, which is less than 1.20 MB"
    assert low[0].metrics()["checkpoint/low_disk/gigabytes"] == low[0].nbytes / 1e9
    assert "the run ends" in caplog.text


def run_until_stopped(directory: Path) -> None:
    model = nn.Linear(8, 8)
    fully_shard(model)
    with pytest.MonkeyPatch.context() as patch:
        small_disk(patch, directory, 0)
        keep = latest(2) | low_disk(1, "stop")
        save = ShardedSave(directory, model=model, when=every(2), keep=keep, async_mode="disabled")
        with Hooks(save) as hooks:
            step = 0
            while not hooks.should_stop:
                step += 1
                hooks.step(step)
                assert step < 50
        steps = [None, None]
        dist.all_gather_object(steps, step)
        assert steps == [step, step]
        assert committed_steps(directory)[-1] == step


def test_all_ranks_stop_after_the_same_step(tmp_path: Path) -> None:
    run_on_ranks(run_until_stopped, 2, tmp_path, tmp_path / "run")


def test_exports_are_thinned_out_with_their_averages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shardsmith.hooks import EMA

    model = nn.Linear(1000, 100, bias=False)
    ema = EMA(model, decay=0.9)
    small_disk(monkeypatch, tmp_path / "hf", SIZE * 5)
    keep = low_disk(SIZE * 2, "thin_out")
    export = HFExport(
        tmp_path / "hf", model=model, ema=ema, when=every(1), keep=keep, dtype="float32", ema_as="directory"
    )
    with Hooks(ema, export) as hooks:
        for step in range(1, 5):
            hooks.step(step)
    assert sorted(path.name for path in (tmp_path / "hf").glob("step-*")) == ["step-4", "step-4-ema"]


REFUSED: dict[str, Callable[[], object]] = {
    "no size": lambda: low_disk("much"),
    "no action": lambda: low_disk("5GB", "panic"),  # type: ignore[arg-type]
    "nothing": lambda: low_disk(0),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_sense_is_refused(what: str) -> None:
    with pytest.raises(UsageError, match="low_disk"):
        REFUSED[what]()


def test_it_reads_like_the_call_and_wants_a_disk(tmp_path: Path) -> None:
    from shardsmith.ground.remote_path import as_path

    keep = latest(3) | low_disk("5GB", "stop")
    assert repr(keep) == 'latest(3) | low_disk("5000000000", "stop")'
    assert low_disk("5GB", "stop") | latest(3) == keep
    assert low_disk("5GB").keep([1, 2, 3]) == {1, 2, 3}
    refuse_without_disk(keep, tmp_path)
    with pytest.raises(UsageError, match="object store"):
        refuse_without_disk(keep, as_path("s3://bucket/run"))
