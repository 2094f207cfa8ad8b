"""Options that cannot have an effect, and a decay that is changed at a resume."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import pytest

from shardsmith.errors import UsageError
from shardsmith.integrations.torchtitan.options import CheckpointHooks, parse
from tests.titan.checkpoints import tensors_of
from tests.titan.cpu import IS_0_3
from tests.titan.jobs import OVERRIDE, Assets, Job, error_of, run_jobs

OFF = ["--checkpoint.no-enable"]


@pytest.fixture(scope="module")
def jobs(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Short runs on one rank. Read only."""
    root = tmp_path_factory.mktemp("options")
    one = ["--training.steps=1"]
    first = Job(run=root / "first", hooks={"ema_decay": 0.5}, options=one)
    run_jobs(assets, 1, root, first)
    for name in ("other decay", "allowed"):
        shutil.copytree(first.run, root / name)
    two = ["--training.steps=2"]
    jobs = {
        "average for nobody": Job(run=root / "a", hooks={"ema_decay": 0.5}, options=[*one, *OFF]),
        "manifest of nothing": Job(run=root / "b", hooks={"metadata": True}, options=[*one, *OFF]),
        "average for exports": Job(run=root / "c", hooks={"ema_decay": 0.5, "export_last": True}, options=[*one, *OFF]),
        "other decay": Job(run=root / "other decay", hooks={"ema_decay": 0.75}, options=two),
        "allowed": Job(run=root / "allowed", hooks={"ema_decay": 0.75, "ema_allow_other_decay": True}, options=two),
    }
    run_jobs(assets, 1, root, *jobs.values())
    return jobs


@pytest.mark.parametrize(("name", "option"), [("average for nobody", "ema_decay"), ("manifest of nothing", "metadata")])
def test_an_option_without_effect_is_refused(jobs: dict[str, Job], name: str, option: str) -> None:
    assert f"{option} has no effect, since TorchTitan saves no checkpoints in this run" in error_of(jobs[name])


def test_an_average_that_is_only_exported_is_none_of_these(jobs: dict[str, Job]) -> None:
    assert error_of(jobs["average for exports"]) == ""


def test_another_decay_is_refused_with_what_to_set_and_goes_on_where_it_is_set(jobs: dict[str, Job]) -> None:
    error = error_of(jobs["other decay"])
    assert "kept with decay 0.5, ema_decay is 0.75" in error
    assert "ema_allow_other_decay" in error
    assert error_of(jobs["allowed"]) == ""
    folder = jobs["allowed"].run / "checkpoint"
    before, after = tensors_of(folder / "step-1", "ema"), tensors_of(folder / "step-2", "ema")
    weights = tensors_of(folder / "step-2")
    name = "norm.weight"
    assert (before[name].lerp(weights[name], 0.25) - after[name]).abs().max() < 1e-6


def test_the_nearest_option_is_named() -> None:
    with pytest.raises(UsageError, match="ema_decay is the nearest to ema_decya"):
        parse({"ema_decya": 0.9})


def test_no_time_to_wait_is_refused() -> None:
    with pytest.raises(UsageError, match="timeout_secs=0: a positive number of seconds"):
        CheckpointHooks(metadata=True, timeout_secs=0).check()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_host_memory": "8GB"}, "max_host_memory needs engine, or export_interval or export_last"),
        ({"max_host_memory": "eight", "engine": True}, "max_host_memory='eight'"),
    ],
)
def test_a_bound_of_copies_that_means_nothing_is_refused(options: dict[str, object], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        parse(options)
    assert parse({"max_host_memory": "8GB", "export_last": True}).max_host_memory == "8GB"


@pytest.mark.skipif(not IS_0_3, reason="0.2 has no overrides")
def test_another_manager_is_refused_by_name() -> None:
    """TorchTitan itself would only warn that the override has no target."""
    from torchtitan.components.checkpointer import BaseCheckpointManager
    from torchtitan.config.override import OverrideConfig, apply_overrides

    from tests.titan.configs import llama3_small

    class Other(BaseCheckpointManager):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseCheckpointManager.Config):
            pass

    config = llama3_small()
    config.checkpoint = Other.Config()
    with pytest.raises(UsageError, match=r"this run has .*Other\.Config"):
        apply_overrides(OverrideConfig(imports=[(OVERRIDE, {"metadata": True})]), config)
