"""The average and its way through TorchTitan's own checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from shardsmith.formats.adopt import adopt
from shardsmith.manifest.metadata import read_metadata
from tests.titan.checkpoints import digests_of, steps_in, tensors_of, value_of
from tests.titan.jobs import BFLOAT16, Assets, Job, error_of, log_of, run_jobs

EMA = {"ema_decay": 0.75}
SCHEDULE = "--lr_scheduler.total_steps=6"


@pytest.fixture(scope="module")
def runs(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Jobs of two ranks, done one after the other. Read only."""
    root = tmp_path_factory.mktemp("runs")
    every_step = ["--checkpoint.interval=1", "--training.global_batch_size=8"]
    jobs = {
        "averaged": Job(run=root / "averaged", hooks={**EMA, "ema_start_step": 1}, options=every_step),
        "straight": Job(run=root / "straight", hooks=EMA, options=[*BFLOAT16, "--training.steps=6", SCHEDULE]),
        "stopped": Job(run=root / "stopped", hooks=EMA, options=[*BFLOAT16, "--training.steps=3", SCHEDULE]),
        "plain": Job(run=root / "plain"),
        "idle": Job(run=root / "idle", hooks={}),
        "weights only": Job(run=root / "weights", hooks=EMA, options=["--checkpoint.last-save-model-only"]),
    }
    run_jobs(assets, 2, root, *jobs.values())
    assert {name: error_of(job) for name, job in jobs.items()} == dict.fromkeys(jobs, "")
    return jobs


def test_it_is_the_average_of_the_weights_after_each_step(runs: dict[str, Job]) -> None:
    folder = runs["averaged"].run / "checkpoint"
    expected = tensors_of(folder / "step-1")  # where it starts as a copy
    for step in (2, 3, 4):
        for name, weight in tensors_of(folder / f"step-{step}").items():
            expected[name] = expected[name].lerp(weight, 0.25)
        found = tensors_of(folder / f"step-{step}", "ema")
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(found["tok_embeddings.weight"], tensors_of(folder / "step-4")["tok_embeddings.weight"])


def test_it_moves_once_a_step_when_gradients_are_accumulated(runs: dict[str, Job]) -> None:
    assert "gradient accumulation steps 2" in log_of(runs["averaged"])
    assert int(value_of(runs["averaged"].run / "checkpoint" / "step-4", "ema_state.updates")) == 4


def test_metadata_says_what_is_in_a_step(runs: dict[str, Job]) -> None:
    metadata = read_metadata(runs["averaged"].run / "checkpoint" / "step-3")
    assert (metadata.step, metadata.models, metadata.world_size) == (3, ("main", "ema"), 2)
    assert metadata.ema == {"decay": 0.75, "warmup": False, "start_step": 1, "every_n_steps": 1, "updates": 3}
    assert metadata.mesh is not None
    assert metadata.mesh["shape"] == [2]
    assert metadata.counts["main"].elements == metadata.counts["ema"].elements


def test_a_resumed_run_equals_an_uninterrupted_one(assets: Assets, runs: dict[str, Job], tmp_path: Path) -> None:
    resumed = Job(run=runs["stopped"].run, hooks=EMA, options=[*BFLOAT16, "--training.steps=6", SCHEDULE])
    run_jobs(assets, 2, tmp_path, resumed)
    assert error_of(resumed) == ""
    assert "Training starts at step 4" in log_of(resumed)
    straight = digests_of(runs["straight"].run / "checkpoint" / "step-6")
    assert digests_of(resumed.run / "checkpoint" / "step-6") == straight
    assert any(key.startswith("ema_model.") for key in straight)
    assert any(key.startswith("optimizer.") for key in straight)


def save_what_was_loaded(trainer: Any, run: Path) -> None:
    states = trainer.checkpointer.states
    dcp.save(
        {**states["model"].state_dict(), "ema_model": states["ema_model"], "ema_state": states["ema_state"]},
        checkpoint_id=run / "loaded",
    )
    (run / "step.json").write_text(json.dumps(trainer.step))


@pytest.mark.parametrize("ranks", [1, 4])
def test_it_is_resumed_on_other_ranks(assets: Assets, runs: dict[str, Job], tmp_path: Path, ranks: int) -> None:
    start = runs["straight"].run / "checkpoint" / "step-4"
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint" / "step-4").symlink_to(start)
    resumed = Job(
        run=tmp_path / "run",
        hooks=EMA,
        options=["--checkpoint.exclude_from_loading=dataloader"],  # TorchTitan does not divide it anew
        observe=save_what_was_loaded,
    )
    run_jobs(assets, ranks, tmp_path, resumed)
    assert error_of(resumed) == ""
    assert json.loads((tmp_path / "run" / "step.json").read_text()) == 4
    adopt(tmp_path / "run" / "loaded", step=4)
    loaded, saved = digests_of(tmp_path / "run" / "loaded"), digests_of(start)
    assert loaded == {key: saved[key] for key in loaded}
    assert {"tok_embeddings.weight", "ema_model.tok_embeddings.weight", "ema_state.updates"} <= loaded.keys()


def test_a_run_that_was_begun_without_an_average_goes_on_with_one(
    assets: Assets, runs: dict[str, Job], tmp_path: Path
) -> None:
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint" / "step-2").symlink_to(runs["plain"].run / "checkpoint" / "step-2")
    resumed = Job(run=tmp_path / "run", hooks={"ema_decay": 0.0}, options=["--training.steps=3"])
    run_jobs(assets, 2, tmp_path, resumed)
    assert error_of(resumed) == ""
    assert "holds no average" in log_of(resumed)
    assert not (runs["plain"].run / "checkpoint" / "step-2" / "metadata.json").exists()
    step = resumed.run / "checkpoint" / "step-3"
    assert int(value_of(step, "ema_state.updates")) == 1
    assert torch.equal(tensors_of(step, "ema")["norm.weight"], tensors_of(step)["norm.weight"])


def test_a_last_save_of_weights_only_has_the_average_too(runs: dict[str, Job]) -> None:
    metadata = read_metadata(runs["weights only"].run / "checkpoint" / "step-4")
    assert metadata.models == ("main", "ema")
    assert not any(key.startswith("optimizer.") for key in metadata.tensors)


def test_a_run_cannot_go_on_from_weights_only_and_is_told_how(
    assets: Assets, runs: dict[str, Job], tmp_path: Path
) -> None:
    again = Job(run=runs["weights only"].run, hooks=EMA, options=["--training.steps=6"])
    run_jobs(assets, 2, tmp_path, again)
    assert "a run cannot go on from this step" in error_of(again)
    assert "optimizer: not in it" in error_of(again)
    assert "checkpoint.load_step" in error_of(again)


def test_hooks_without_options_change_not_a_byte(runs: dict[str, Job]) -> None:
    plain, idle = (runs[name].run / "checkpoint" for name in ("plain", "idle"))
    assert steps_in(plain) == steps_in(idle) == ["step-2", "step-4"]
    for step in steps_in(plain):
        assert steps_in(plain / step) == steps_in(idle / step) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
        for shard in ("__0_0.distcp", "__1_0.distcp"):
            assert (plain / step / shard).read_bytes() == (idle / step / shard).read_bytes()
    losses = [
        [line.split("memory")[0] for line in log_of(runs[name]).splitlines() if "loss:" in line]
        for name in ("plain", "idle")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
