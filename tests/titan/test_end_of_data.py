"""Runs that have no step left to make: their data has ended, or a former run has made all of them."""

from __future__ import annotations

import contextlib
import itertools
import shlex
import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchtitan.components.dataloader
from safetensors.torch import load_file

from shardsmith.cli import main
from shardsmith.integrations.torchtitan import end_of_data
from tests.titan.checkpoints import steps_in, tensors_of
from tests.titan.cpu import trainer
from tests.titan.evaluation import FLOAT32, evaluated, losses_of, transformers_loss
from tests.titan.jobs import Assets, Job, error_of, log_of, run_jobs

LAST = {"export_last": True, "export_dtype": "float32"}
STEPS = [*FLOAT32, "--training.steps=9"]


@contextlib.contextmanager
def data_for(steps: int) -> Iterator[None]:
    """There are batches for so many steps, on each rank; the model is evaluated after the last of them."""
    original = trainer.Trainer.batch_generator

    def batch_generator(self: Any, batches: Iterable[Any]) -> Any:
        return original(self, itertools.islice(batches, steps))

    trainer.Trainer.batch_generator = batch_generator
    try:
        with evaluated(steps):
            yield
    finally:
        trainer.Trainer.batch_generator = original


@contextlib.contextmanager
def data_for_rank_0_alone(steps: int) -> Iterator[None]:
    """As ``data_for``; in the step in which it ends rank 1 fails."""
    original, patience = trainer.Trainer.train_step, end_of_data._END_SECS

    def train_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.step == steps + 1 and dist.get_rank() == 1:
            raise OSError("the disk of the data is gone")
        return original(self, *args, **kwargs)

    trainer.Trainer.train_step, end_of_data._END_SECS = train_step, 0.5
    try:
        with data_for(steps):
            yield
    finally:
        trainer.Trainer.train_step, end_of_data._END_SECS = original, patience


@pytest.fixture(scope="module")
def jobs(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    root = tmp_path_factory.mktemp("ends")
    ended = {
        "plain": Job(run=root / "plain", options=STEPS, within=partial(data_for, 3)),
        "ended": Job(run=root / "ended", options=STEPS, hooks={"ema_decay": 0.5, **LAST}, within=partial(data_for, 3)),
        "alone": Job(
            run=root / "alone",
            options=STEPS,
            hooks={"metadata": True, **LAST},
            within=partial(data_for_rank_0_alone, 3),
        ),
        "none": Job(run=root / "none", options=STEPS, hooks=LAST, within=partial(data_for, 0)),
    }
    run_jobs(assets, 2, root, *ended.values())
    # Runs of 4 steps that are all made already: with an export of the last, and without.
    shutil.copytree(ended["ended"].run / "checkpoint" / "step-2", root / "done" / "checkpoint" / "step-2")
    done = Job(run=root / "done", options=[*FLOAT32, "--training.steps=2"], hooks={"ema_decay": 0.5, **LAST})
    run_jobs(assets, 2, root, done)
    return {**ended, "done": done}


def test_the_last_export_is_of_the_step_at_which_the_data_ended(jobs: dict[str, Job]) -> None:
    job = jobs["ended"]
    assert (error_of(job, 0), error_of(job, 1)) == ("", "")
    assert "the data ended before step 4: step 3 is the last one" in log_of(job)
    assert steps_in(job.run / "hf") == ["step-3", "step-3-ema"]
    losses = losses_of(job.run)
    for model, suffix in (("main", ""), ("ema", "-ema")):
        assert transformers_loss(job.run / "hf" / f"step-3{suffix}") == pytest.approx(losses[model], abs=1e-4)


def test_its_checkpoints_are_those_of_a_run_without_hooks(jobs: dict[str, Job]) -> None:
    plain, hooked = (jobs[name].run / "checkpoint" for name in ("plain", "ended"))
    assert steps_in(plain) == steps_in(hooked) == ["step-2"]
    expected, found = (tensors_of(folder / "step-2") for folder in (plain, hooked))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_rank_that_ends_alone_says_what_was_not_done_and_the_command_that_does_it(jobs: dict[str, Job]) -> None:
    job = jobs["alone"]
    assert (error_of(job, 0), error_of(job, 1)) == ("", "OSError: the disk of the data is gone")
    assert "the data of this rank ended before step 4, and that of others did not" in log_of(job)
    (line,) = [line for line in log_of(job).splitlines() if "the training ended early, after step 3" in line]
    assert steps_in(job.run / "hf") == []
    command = shlex.split(line.partition("To export the newest checkpoint: shardsmith ")[2])
    assert main([*command, "--dtype", "float32", "--quiet"]) == 0
    found = load_file(job.run / "hf" / "step-2" / "model.safetensors")
    assert found["model.norm.weight"].shape == (256,)


def test_a_run_without_any_data_exports_nothing_and_says_so(jobs: dict[str, Job]) -> None:
    assert error_of(jobs["none"]) == ""
    assert "there was no data for step 1: nothing is exported" in log_of(jobs["none"])
    assert steps_in(jobs["none"].run / "hf") == []


def test_a_run_that_has_no_step_left_makes_the_last_export(jobs: dict[str, Job]) -> None:
    assert error_of(jobs["done"]) == ""
    assert steps_in(jobs["done"].run / "hf") == ["step-2", "step-2-ema"]
    assert steps_in(jobs["done"].run / "checkpoint") == ["step-2"]


def test_torchtitan_raises_the_error_that_is_waited_for() -> None:
    assert hasattr(torchtitan.components.dataloader, end_of_data.ERROR)
