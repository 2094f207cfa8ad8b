"""CheckpointHooks on the real Trainer of transformers, on real ranks: average, resume, folders, exports."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shardsmith.manifest.companion import find_folder_damage
from tests.integrations.trainer_runs import CASES, RESUMED, STEPS, Case, assert_close, assert_equal, averaged, run

Finished = Callable[[Case], Path]
FORGETFUL = ("fsdp1",)
"""Where Trainer and accelerate alone do not give back the optimizer's state: they ask an empty one what to load."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_average_is_that_of_the_formula(finished: Finished, case: Case) -> None:
    truth = torch.load(finished(case) / "truth.pt")
    assert len(truth["history"]) == STEPS + 1
    assert_close(truth["ema"], averaged(truth["history"]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_resumed_run_ends_as_the_uninterrupted_one(finished: Finished, case: Case, tmp_path: Path) -> None:
    before = finished(case) / "out" / f"checkpoint-{RESUMED}"
    shutil.copytree(before, tmp_path / "out" / before.name)
    run(case, tmp_path, resume=str(tmp_path / "out" / before.name))
    straight, resumed = torch.load(finished(case) / "truth.pt"), torch.load(tmp_path / "truth.pt")
    assert len(resumed["history"]) == STEPS - RESUMED + 1
    assert_equal(resumed["history"][0], straight["history"][RESUMED])
    assert_close(resumed["ema"], averaged(straight["history"][: RESUMED + 1] + resumed["history"][1:]))
    if case.sharding not in FORGETFUL:
        assert_equal(resumed["main"], straight["main"])
        assert_equal(resumed["ema"], straight["ema"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_folder_is_as_trainer_left_it_but_for_our_directory(finished: Finished, case: Case) -> None:
    folder = finished(case) / "out" / f"checkpoint-{RESUMED}"
    assert find_folder_damage(folder) == []
    times = [os.stat(finished(case) / "out" / f"checkpoint-{step}").st_mtime_ns for step in (2, 4, 6)]
    assert times == sorted(times)
    assert os.stat(folder).st_mtime_ns < os.stat(folder / "shardsmith").st_mtime_ns


def test_a_run_without_an_average_gets_one_where_it_goes_on(tmp_path: Path) -> None:
    case = Case(sharding="ddp", kind="qwen2", hooks={"ema_decay": None, "export": None, "dtype": None})
    run(case, tmp_path, name="without.pt")
    for step in (4, 6):  # of which one has a directory of ours, without an average, and the other has none at all
        folder = tmp_path / "out" / f"checkpoint-{step}"
        if step == 6:
            shutil.rmtree(folder / "shardsmith")
        with_average = {"export": None, "dtype": None, "on_missing": "start"}
        arguments = {"max_steps": 8, "output_dir": str(tmp_path / f"on-{step}")}
        resumed = Case(sharding="ddp", kind="qwen2", hooks=with_average, arguments=arguments)
        run(resumed, tmp_path, resume=str(folder), name=f"with-{step}.pt")
        truth = torch.load(tmp_path / f"with-{step}.pt")
        assert len(truth["history"]) == 8 - step + 1
        assert_close(truth["ema"], averaged(truth["history"]))
    refused = Case(sharding="ddp", kind="qwen2", hooks={"export": None, "dtype": None})
    with pytest.raises(Exception, match=r'holds no average.*on_missing="start", in CheckpointHooks\(\.\.\.\) of the T'):
        run(refused, tmp_path, resume=str(tmp_path / "out" / "checkpoint-4"), name="none.pt")
