"""Features of TorchTitan's own beside the hooks: a run with them has the values of the same run without."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shardsmith.formats.dcp.source import DcpSource
from shardsmith.tensors.tensors import read_tensor
from tests.titan.checkpoints import steps_in
from tests.titan.cpu import IS_0_3
from tests.titan.jobs import Assets, Job, error_of, log_of, run_jobs

HOOKS = {"ema_decay": 0.5, "engine": True, "export_last": True}
SEED = "--debug.seed=1"


def validation(assets: Assets) -> list[str]:
    """After each step, one batch of the same data."""
    if IS_0_3:
        loader = "--validator.dataloader.dataset"
        data = [f"{loader}=c4_test", f"{loader}_path={assets.data}"]
        return ["--validator.enable", "--validator.freq=1", "--validator.steps=1", *data]
    data = ["--validation.dataset=c4_test", f"--validation.dataset_path={assets.data}", "--validation.seq_len=32"]
    batch = ["--validation.local_batch_size=2"]
    return ["--validation.enable", "--validation.freq=1", "--validation.steps=1", *data, *batch]


def all_in(step: Path) -> dict[str, Tensor]:
    """Every tensor of a step folder: weights, optimizer, average."""
    source = DcpSource(step)
    try:
        return {key: read_tensor(source, key) for key in source.specs}
    finally:
        source.close()


def assert_has_all_of(step: Path, plain: Path) -> None:
    found, expected = all_in(step), all_in(plain)
    assert {key for key in found if not key.startswith("ema_")} == expected.keys()
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in expected.items())


@pytest.fixture(scope="module")
def runs(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each feature twice, with the hooks and, as plain-..., without."""
    root = tmp_path_factory.mktemp("beside")
    seed = [SEED, "--checkpoint.create_seed_checkpoint"]
    jobs = [Job(run=root / f"{name}seed", options=seed, hooks=hooks) for name, hooks in (("", HOOKS), ("plain-", None))]
    run_jobs(assets, 1, root, *jobs)
    features = {
        "seed": ["--training.steps=2"],
        "many": [
            *("--training.steps=3", "--training.global_batch_size=8", "--checkpoint.enable_first_step_checkpoint"),
            *("--checkpoint.keep_latest_k=2", "--checkpoint.async_mode=async_with_pinned_mem", *validation(assets)),
        ],
        "bfloat16": [
            *("--training.steps=1", "--checkpoint.last_save_model_only", "--checkpoint.export_dtype=bfloat16"),
        ],
    }
    for name, options in features.items():
        jobs.append(Job(run=root / name, options=[SEED, *options], hooks=HOOKS))
        jobs.append(Job(run=root / f"plain-{name}", options=[SEED, *options]))
    shutil.copytree(jobs[0].run, root / "only")
    jobs.append(
        Job(run=root / "only", options=["--checkpoint.load_only", "--training.steps=2"], hooks={"export_last": True})
    )
    run_jobs(assets, 2, root, *jobs[2:])
    assert [error_of(job) for job in jobs] == [""] * len(jobs)
    return root


def test_a_seed_checkpoint_has_the_values_of_torchtitans_own(runs: Path) -> None:
    assert_has_all_of(runs / "seed" / "checkpoint" / "step-0", runs / "plain-seed" / "checkpoint" / "step-0")
    assert steps_in(runs / "seed" / "hf") == ["step-2", "step-2-ema"]  # none of step 0


@pytest.mark.parametrize(("name", "step"), [("seed", 2), ("many", 3), ("bfloat16", 1)])
def test_the_last_step_has_the_values_of_a_run_without_hooks(runs: Path, name: str, step: int) -> None:
    """From the seed; with validation, accumulation and pinned memory; with weights alone, in another dtype."""
    assert_has_all_of(*(runs / run / "checkpoint" / f"step-{step}" for run in (name, f"plain-{name}")))
    assert [path for path in steps_in(runs / name / "hf") if path.startswith(f"step-{step}")] != []


def test_as_many_steps_are_kept_as_torchtitan_is_told(runs: Path) -> None:
    assert steps_in(runs / "many" / "checkpoint") == ["step-2", "step-3"]
    assert "validate" in log_of(Job(run=runs / "many"))


def test_a_run_that_loads_only_saves_nothing_and_exports(runs: Path) -> None:
    assert steps_in(runs / "only" / "checkpoint") == ["step-0"]
    assert steps_in(runs / "only" / "hf") == ["step-2"]
