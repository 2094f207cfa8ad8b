"""Initial loads of all that a run has, optimizer included: ``initial_load_model_only=False``."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shardsmith.ground.layout import METADATA_FILE
from tests.titan.cpu import checkpoint
from tests.titan.jobs import Assets, Job, error_of, log_of, run_jobs

REST = "tensors equal those that were saved in"


@contextlib.contextmanager
def wrong_moments() -> Iterator[None]:
    """TorchTitan's load, and then other second moments than it has read; the weights are right."""
    original = checkpoint.CheckpointManager.dcp_load

    def dcp_load(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for optimizer in self.states["optimizer"].optimizers:
            for state in optimizer.state.values():
                with torch.no_grad():
                    state["exp_avg_sq"].mul_(2)

    checkpoint.CheckpointManager.dcp_load = dcp_load
    try:
        yield
    finally:
        checkpoint.CheckpointManager.dcp_load = original


@pytest.fixture(scope="module")
def jobs(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    root = tmp_path_factory.mktemp("whole")
    first = Job(run=root / "first", options=["--training.steps=2"], hooks={"metadata": True})
    run_jobs(assets, 2, root, first)
    step = first.run / "checkpoint" / "step-2"
    shutil.copytree(step, unrecorded := root / "unrecorded" / "step-2")
    (unrecorded / METADATA_FILE).unlink()

    def going_on_from(path: Path, name: str, *options: str, **fields: Any) -> Job:
        whole = [f"--checkpoint.initial_load_path={path}", "--training.steps=3", *options]
        return Job(run=root / name, options=whole, hooks={"prove_load": True}, **fields)

    jobs = {
        "whole": going_on_from(step, "whole", "--checkpoint.no-initial-load-model-only"),
        "wrong": going_on_from(step, "wrong", "--checkpoint.no-initial-load-model-only", within=wrong_moments),
        "unrecorded": going_on_from(unrecorded, "bare", "--checkpoint.no-initial-load-model-only"),
        "model only": going_on_from(step, "model-only"),
    }
    run_jobs(assets, 2, root, *jobs.values())
    return jobs


def test_the_optimizer_is_verified_and_the_log_says_so(jobs: dict[str, Job]) -> None:
    assert error_of(jobs["whole"]) == ""
    assert "Training starts at step 3" in log_of(jobs["whole"])
    assert len([line for line in log_of(jobs["whole"]).splitlines() if REST in line]) == 1


def test_an_optimizer_that_is_not_what_was_saved_stops_the_run_by_name(jobs: dict[str, Job]) -> None:
    error = error_of(jobs["wrong"])
    assert "are not what was saved" in error
    assert "exp_avg_sq" in error
    assert "Training starts" not in log_of(jobs["wrong"])


def test_what_is_not_verified_is_said(jobs: dict[str, Job]) -> None:
    assert error_of(jobs["unrecorded"]) == ""
    assert "the weights are verified, the optimizer and the rest are not" in log_of(jobs["unrecorded"])
    assert REST not in log_of(jobs["unrecorded"])


def test_a_load_of_the_model_alone_speaks_of_nothing_else(jobs: dict[str, Job]) -> None:
    assert error_of(jobs["model only"]) == ""
    assert "elements) equal those of" in log_of(jobs["model only"])
    assert REST not in log_of(jobs["model only"])
    assert "the optimizer and the rest" not in log_of(jobs["model only"])
