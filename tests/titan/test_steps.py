"""Which of TorchTitan's step folders are complete, which are resumed from, and which go."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException

from shardsmith.formats import adopt
from shardsmith.formats.by_path import DCP, detect_checkpoint_format
from shardsmith.ground.layout import METADATA_FILE
from shardsmith.ground.leases import hold
from shardsmith.hooks import record
from shardsmith.manifest.checkpoints import committed_steps, find_damage
from tests.titan.checkpoints import digests_of, steps_in, tensors_of
from tests.titan.cpu import IS_0_3
from tests.titan.jobs import Assets, Job, error_of, log_of, run_jobs
from tests.unreadable import UNREADABLE

METADATA = {"metadata": True}


@contextlib.contextmanager
def killed_after_saving() -> Iterator[None]:
    """Every rank dies when step 4 was saved and is about to be recorded."""
    original = record.adopt

    def adopt_or_die(*args: Any, step: int, **kwargs: Any) -> Path:
        if step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, step=step, **kwargs)

    record.adopt = adopt_or_die
    try:
        yield
    finally:
        record.adopt = original


@contextlib.contextmanager
def unreadable_for_rank_1() -> Iterator[None]:
    """Of step 2 rank 1 can read nothing back."""
    original = adopt.hash_file

    def hash_or_fail(path: Path) -> str:
        if path.parent.name == "step-2" and dist.get_rank() == 1:
            raise OSError("the disk is gone")
        return original(path)

    adopt.hash_file = hash_or_fail
    try:
        yield
    finally:
        adopt.hash_file = original


def test_the_mark_appears_after_all_data(assets: Assets, tmp_path: Path) -> None:
    jobs = [
        Job(run=tmp_path / mode, hooks={"ema_decay": 0.9}, options=[f"--checkpoint.async_mode={mode}"])
        for mode in ("disabled", "async", "async_with_pinned_mem")
    ]
    run_jobs(assets, 2, tmp_path, *jobs)
    for job in jobs:
        assert error_of(job) == ""
        assert committed_steps(job.run / "checkpoint") == [2, 4]
        for step in (2, 4):
            folder = job.run / "checkpoint" / f"step-{step}"
            assert find_damage(folder) == []
            *data, mark = sorted(folder.iterdir(), key=lambda path: path.stat().st_ctime_ns)
            assert mark.name == METADATA_FILE
            assert {path.name for path in data} == {".metadata", "__0_0.distcp", "__1_0.distcp"}


def test_a_step_killed_between_data_and_manifest_is_whole_and_gets_one(assets: Assets, tmp_path: Path) -> None:
    killed = Job(run=tmp_path / "run", hooks=METADATA, within=killed_after_saving)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_jobs(assets, 2, tmp_path, killed)
    whole = killed.run / "checkpoint" / "step-4"
    assert detect_checkpoint_format(whole).name == DCP
    assert committed_steps(whole.parent) == [2]

    resumed = Job(run=killed.run, hooks=METADATA, options=["--training.steps=5"])
    run_jobs(assets, 2, tmp_path, resumed)
    assert error_of(resumed) == ""
    assert "Training starts at step 5" in log_of(resumed)
    assert committed_steps(whole.parent) == [2, 4, 5]
    assert find_damage(whole) == []


def test_a_step_that_is_written_anew_is_incomplete_meanwhile(assets: Assets, tmp_path: Path) -> None:
    first = Job(run=tmp_path / "run", hooks=METADATA)
    again = Job(run=first.run, hooks=METADATA, options=["--checkpoint.load_step=2"], within=killed_after_saving)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_jobs(assets, 2, tmp_path, first, again)
    assert error_of(first) == ""
    assert committed_steps(first.run / "checkpoint") == [2]


def test_what_fails_in_the_background_ends_the_run_on_all_ranks(assets: Assets, tmp_path: Path) -> None:
    job = Job(run=tmp_path / "run", hooks=METADATA, within=unreadable_for_rank_1, options=["--training.steps=3"])
    run_jobs(assets, 2, tmp_path, job)
    for rank in (0, 1):
        assert "the disk is gone" in error_of(job, rank)
    assert "step-2 was not recorded" in log_of(job)
    assert 2 not in committed_steps(job.run / "checkpoint")


def test_as_many_complete_steps_are_kept_as_torchtitan_is_told(assets: Assets, tmp_path: Path) -> None:
    options = ["--checkpoint.interval=1", "--checkpoint.keep_latest_k=2"]
    job = Job(run=tmp_path / "run", hooks=METADATA, options=[*options, "--training.steps=3"])
    run_jobs(assets, 2, tmp_path, job)
    folder = job.run / "checkpoint"
    assert steps_in(folder) == ["step-2", "step-3"]

    foreign = folder / "hf-export-step-900"  # TorchTitan's own retention would count it, and resume from it
    foreign.mkdir()
    (folder / "step-1").mkdir()  # torn: nothing but a shard
    (folder / "step-1" / "__0_0.distcp").write_bytes(b"")
    resumed = Job(run=job.run, hooks=METADATA, options=[*options, "--training.steps=5"])
    with hold(folder / "step-2"):
        run_jobs(assets, 2, tmp_path, resumed)
    assert error_of(resumed) == ""
    assert steps_in(folder) == ["hf-export-step-900", "step-2", "step-4", "step-5"]
    assert find_damage(folder / "step-5") == []


def test_incomplete_steps_never_drive_out_the_last_complete_one(assets: Assets, tmp_path: Path) -> None:
    options = ["--checkpoint.interval=1", "--checkpoint.keep_latest_k=2"]
    job = Job(run=tmp_path / "run", hooks=METADATA, options=[*options, "--training.steps=2"])
    run_jobs(assets, 2, tmp_path, job)
    folder = job.run / "checkpoint"
    for torn in ("step-20", "step-30"):  # two newer ones, torn, by which TorchTitan's own retention goes
        (folder / torn).mkdir()
        (folder / torn / ".metadata").write_bytes(b"")
    resumed = Job(run=job.run, hooks=METADATA, options=[*options, "--training.steps=3"])
    run_jobs(assets, 2, tmp_path, resumed)
    assert error_of(resumed) == ""
    assert "Training starts at step 3" in log_of(resumed)
    assert steps_in(folder) == ["step-2", "step-20", "step-3", "step-30"]
    assert digests_of(folder / "step-3")


if IS_0_3:

    def test_options_are_joined_or_refused(assets: Assets, tmp_path: Path) -> None:
        config = "--config=llama3_small_with_hooks"
        registry = Job(run=tmp_path / "registry", options=[config])
        joined = Job(run=tmp_path / "joined", options=[config], hooks={"ema_decay": 0.9})
        unknown = Job(run=tmp_path / "unknown", hooks={"ema_decya": 0.9})
        run_jobs(assets, 1, tmp_path, registry, joined, unknown)
        assert (error_of(registry), error_of(joined)) == ("", "")
        assert digests_of(registry.run / "checkpoint" / "step-4")
        assert digests_of(joined.run / "checkpoint" / "step-4", "ema_model.")
        assert "there is no option ema_decya. There are:\n  ema_decay" in error_of(unknown)

else:

    def test_options_are_refused_where_they_are_not_known_or_not_looked_at(assets: Assets, tmp_path: Path) -> None:
        toml = tmp_path / "job.toml"
        toml.write_text(
            '[job]\ncustom_config_module = "shardsmith.integrations.torchtitan.job_config"\n'
            "[checkpoint_hooks]\nema_decay = 0.9\n"
        )
        stock = Job(run=tmp_path / "stock", options=[f"--job.config_file={toml}"])
        unknown = Job(run=tmp_path / "unknown", hooks={"ema_decya": 0.9})
        run_jobs(assets, 1, tmp_path, stock, unknown)
        assert "Start the job with -m shardsmith.integrations.torchtitan instead" in error_of(stock)
        assert "there is no option ema_decya. There are:\n  ema_decay" in error_of(unknown)


def test_an_index_whose_bytes_have_changed_is_passed_over_as_any_other_damage(assets: Assets, tmp_path: Path) -> None:
    """It has its size still."""
    first = Job(run=tmp_path / "run", hooks={"ema_decay": 0.9})
    run_jobs(assets, 2, tmp_path, first)
    index = first.run / "checkpoint" / "step-4" / ".metadata"
    content = bytearray(index.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 40)
    content[middle] = bytes(255 - value for value in content[middle])
    index.write_bytes(content)
    again = Job(run=first.run, hooks=first.hooks)
    run_jobs(assets, 2, tmp_path, again)
    assert error_of(again) == ""
    assert "step-4 is damaged and passed over" in log_of(again)
    assert "Training starts at step 3" in log_of(again)
    assert find_damage(index.parent) == []


def test_what_is_no_folder_is_passed_over_and_makes_way_for_its_step(assets: Assets, tmp_path: Path) -> None:
    first = Job(run=tmp_path / "first", hooks={"ema_decay": 0.9})
    run_jobs(assets, 2, tmp_path, first)
    hooks: list[dict[str, Any]] = [{"ema_decay": 0.9}, {"export_last": True, "export_models": "main"}, {"engine": True}]
    again = []
    for number, (put, _) in enumerate(UNREADABLE.values()):
        run = tmp_path / str(number)
        shutil.copytree(first.run / "checkpoint" / "step-2", run / "checkpoint" / "step-2")
        put(run / "checkpoint" / "step-4")
        again.append(Job(run=run, hooks=hooks[number % 3], options=["--checkpoint.keep_latest_k=2"]))
    without = tmp_path / "without"
    (without / "checkpoint").mkdir(parents=True)
    (without / "checkpoint" / "step-4").symlink_to("/nowhere")
    none = Job(run=without, hooks={"metadata": True})
    chosen = Job(run=first.run, hooks={"metadata": True}, options=["--checkpoint.load_step=2"])
    shutil.rmtree(first.run / "checkpoint" / "step-4")
    (first.run / "checkpoint" / "step-4").symlink_to("/nowhere")
    run_jobs(assets, 2, tmp_path, *again, none, chosen)
    reasons = [reason for _, reason in UNREADABLE.values()]
    for job, reason in zip([*again, chosen], [*reasons, "is a link that leads nowhere"], strict=True):
        assert error_of(job) == ""
        step = job.run / "checkpoint" / "step-4"
        assert "Training starts at step 3" in log_of(job)
        assert f"{step} {reason}, and is passed over" in log_of(job) or job is chosen
        assert f"{step} {reason}; it was set aside as {step.parent}/.step-4.damaged-" in log_of(job)
        assert tensors_of(step)
    assert "no step can be resumed from\n  step-4 is a link that leads nowhere" in error_of(none)
