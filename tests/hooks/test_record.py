"""Directories that somebody else writes in place, recorded as soon as they are whole."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardsmith.ground.leases import hold
from shardsmith.hooks import EMA, Event, Hooks, Recorder, latest
from shardsmith.manifest.checkpoints import committed_steps, find_damage
from shardsmith.manifest.metadata import read_metadata
from tests import dcp_directories

MODEL = nn.Linear(3, 2)


def write(path: Path, step: int = 0) -> Path:
    return dcp_directories.save({name: value + step for name, value in MODEL.state_dict().items()}, path)


def save(recorder: Recorder, step: int, end: Future[Any] | None = None) -> Path:
    """What a trainer does at a step."""
    path = recorder.directory / f"step-{step}"
    recorder.begin(path)
    recorder.saved(step, write(path, step), end)
    return path


def test_a_step_is_complete_when_its_save_has_ended_and_not_before(tmp_path: Path) -> None:
    ema = EMA(MODEL, decay=0.9)
    recorder = Recorder(tmp_path / "run", model=MODEL, ema=ema)
    saved: list[tuple[int, Path]] = []
    recorder.announce_saved = lambda step, path: saved.append((step, path))
    end: Future[None] = Future()
    path = save(recorder, 5, end)
    recorder.on_step_end(5)
    assert (committed_steps(tmp_path / "run"), saved) == ([], [])
    end.set_result(None)
    recorder.close()
    assert (committed_steps(tmp_path / "run"), saved) == ([5], [(5, path)])
    assert find_damage(path) == []
    assert read_metadata(path).ema == ema.facts()


def test_recordings_and_removals_are_events(tmp_path: Path) -> None:
    events: list[Event] = []
    recorder = Recorder(tmp_path / "run", model=MODEL, keep=latest(1))
    hooks = Hooks(recorder, on_event=events.append)
    for step in (1, 2):
        save(recorder, step)
        hooks.step(step)
    end: Future[None] = Future()
    end.set_exception(OSError("no space"))
    save(recorder, 3, end)
    with pytest.raises(OSError, match="no space"):
        hooks.close()
    told = [(event.kind, event.step, event.error) for event in events]
    assert told == [("save", 1, None), ("save", 2, None), ("remove", 1, None), ("save", 3, "OSError: no space")]
    assert events[1].nbytes == sum(file.stat().st_size for file in (tmp_path / "run" / "step-2").iterdir())


def test_making_one_makes_no_directory(tmp_path: Path) -> None:
    Recorder(tmp_path / "run", model=MODEL).close()
    assert not (tmp_path / "run").exists()  # some trainers take its being there for a run to go on with


def test_a_save_that_failed_is_raised_and_leaves_no_mark(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run", model=MODEL)
    end: Future[None] = Future()
    save(recorder, 1, end)
    save(recorder, 2)
    end.set_exception(OSError("no space"))
    with pytest.raises(OSError, match="no space"):
        Hooks(recorder).close()
    assert committed_steps(tmp_path / "run") == [2]


def test_a_step_that_is_saved_anew_is_not_complete_meanwhile(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run", model=MODEL)
    path = save(recorder, 1)
    Hooks(recorder).step_end(1)
    recorder.close()
    again = Recorder(tmp_path / "run", model=MODEL)
    again.begin(path)
    assert committed_steps(tmp_path / "run") == []
    again.close()


def test_what_is_older_than_all_that_are_kept_goes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run / "step-1")  # never recorded
    (run / "hf-export-step-2").mkdir(parents=True)
    (run / "step-90").mkdir()  # torn, and newer than all
    recorder = Recorder(run, model=MODEL, keep=latest(2))
    save(recorder, 3)
    recorder.close()
    assert (run / "step-1").exists()  # there are not yet as many as are to be kept
    recorder = Recorder(run, model=MODEL, keep=latest(2))
    with hold(run / "step-3"):
        for step in (4, 5):
            save(recorder, step)
        recorder.close()
    there = {path.name for path in run.iterdir()} - {".retention.json"}
    assert there == {"hf-export-step-2", "step-90", "step-3", "step-4", "step-5"}
    assert torch.equal(dcp_directories.load({"bias": torch.zeros(2)}, run / "step-5")["bias"], MODEL.bias + 5)
