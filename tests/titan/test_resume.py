"""A resume goes on from the newest step that is what was saved; a run that is asked to end leaves such a step."""

from __future__ import annotations

import contextlib
import functools
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shardsmith.manifest.checkpoints import committed_steps, find_damage
from tests.titan.checkpoints import digests_of
from tests.titan.jobs import Assets, Job, error_of, log_of, run_jobs, signalled_in

EMA = {"ema_decay": 0.5}
SCHEDULE = "--lr_scheduler.total_steps=6"
LONGER = [SCHEDULE, "--training.steps=6", "--checkpoint.interval=6"]


def flip(file: Path, share: float) -> None:
    """Change 64 bytes in the middle of a file."""
    data = bytearray(file.read_bytes())
    at = int(len(data) * share)
    data[at : at + 64] = bytes(255 - byte for byte in data[at : at + 64])
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4096])


@contextlib.contextmanager
def another_optimizer() -> Iterator[None]:
    """AdamW keeps one more entry of each parameter."""
    original = torch.optim.AdamW.__init__
    torch.optim.AdamW.__init__ = functools.partialmethod(original, amsgrad=True)
    try:
        yield
    finally:
        torch.optim.AdamW.__init__ = original


@pytest.fixture(scope="module")
def jobs(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Runs with steps 2 and 4 that something has happened to, and that go on. Read only."""
    root = tmp_path_factory.mktemp("resumes")
    straight = Job(run=root / "straight", hooks=EMA, options=[SCHEDULE, "--training.steps=6"])
    first = Job(run=root / "first", hooks=EMA, options=[SCHEDULE])
    stopped = Job(
        run=root / "stopped",
        hooks=EMA,
        options=[SCHEDULE, "--training.steps=6", "--checkpoint.interval=100"],
        within=functools.partial(signalled_in, 2, signal.SIGTERM, 1),
    )
    kept = Job(
        run=root / "kept",
        hooks={**EMA, "save_on_sigterm": True},
        options=[SCHEDULE, "--training.steps=6", "--checkpoint.async_mode=async", "--checkpoint.last_save_model_only"],
        within=functools.partial(signalled_in, 3, signal.SIGTERM, 0),
    )
    run_jobs(assets, 2, root, straight, first, stopped, kept)
    for name in ("flipped", "torn", "cut", "overwritten", "all damaged", "unmarked", "named"):
        shutil.copytree(first.run, root / name)
    step = root / "flipped" / "checkpoint" / "step-4"
    flip(max(step.glob("*.distcp"), key=lambda file: file.stat().st_size), 0.5)
    shutil.copytree(step, root / "named" / "checkpoint" / "step-4", dirs_exist_ok=True)
    cut(root / "cut" / "checkpoint" / "step-4" / "__1_0.distcp")
    (root / "torn" / "checkpoint" / "step-4" / ".metadata").unlink()
    for damaged in (root / "all damaged" / "checkpoint").glob("step-*"):
        cut(damaged / "__0_0.distcp")
    without = [SCHEDULE, "--checkpoint.load_step=2", "--training.steps=4"]
    colleague = Job(run=root / "overwritten", options=without)  # without the hooks: no average is saved
    unmarked = Job(run=root / "unmarked", options=[SCHEDULE, "--training.steps=5", "--checkpoint.interval=5"])
    later = {
        name: Job(run=root / name, hooks=EMA, options=LONGER)
        for name in ("flipped", "torn", "cut", "overwritten", "all damaged", "unmarked", "stopped")
    }
    later["named"] = Job(run=root / "named", hooks=EMA, options=[*LONGER, "--checkpoint.load_step=4"])
    before = {"straight": straight, "first": first, "was stopped": stopped, "kept": kept}
    copies = [Job(run=root / "was stopped")]
    copies[0].run.mkdir()
    for rank in (0, 1):
        shutil.copy(stopped.run / f"log-{rank}.txt", copies[0].run)
        if error_of(stopped, rank):
            shutil.copy(stopped.run / f"error-{rank}.txt", copies[0].run)
    for name in ("other optimizer", "new optimizer", "other size", "new data"):
        shutil.copytree(first.run, root / name)
    again = "--checkpoint.exclude_from_loading="
    later["other optimizer"] = Job(run=root / "other optimizer", hooks=EMA, options=LONGER, within=another_optimizer)
    later["new optimizer"] = Job(
        run=root / "new optimizer",
        hooks=EMA,
        options=[*LONGER, f"{again}optimizer,lr_scheduler"],
        within=another_optimizer,
    )
    run_jobs(assets, 2, root, colleague, unmarked, *later.values())
    of_one_rank = {
        "other size": Job(run=root / "other size", hooks=EMA, options=LONGER),
        "new data": Job(run=root / "new data", hooks=EMA, options=[*LONGER, f"{again}dataloader"]),
    }
    run_jobs(assets, 1, root, *of_one_rank.values())
    later |= of_one_rank
    return {**before, **later, "was stopped": copies[0]}


def started_at(job: Job) -> int:
    """The step that the last run in this folder began with."""
    lines = [line for line in log_of(job).splitlines() if "Training starts at step" in line]
    return int(lines[-1].rpartition(" ")[2])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flipped", "step-4 is damaged and passed over"),
        ("cut", "step-4 is damaged and passed over: __1_0.distcp: has"),
        ("overwritten", "step-4 is damaged and passed over"),
        ("torn", "step-4 was not saved to its end: it has no .metadata"),
    ],
)
def test_a_step_that_is_not_what_was_saved_is_passed_over_in_one_line(
    jobs: dict[str, Job], name: str, words: str
) -> None:
    job = jobs[name]
    assert error_of(job) == ""
    assert len([line for line in log_of(job).splitlines() if words in line]) == 1
    assert started_at(job) == 3
    assert find_damage(job.run / "checkpoint" / "step-6") == []
    assert digests_of(job.run / "checkpoint" / "step-6") == digests_of(jobs["straight"].run / "checkpoint" / "step-6")


def test_what_another_run_cannot_go_on_with_is_named_with_the_option_that_leaves_it_out(jobs: dict[str, Job]) -> None:
    optimizer, size = error_of(jobs["other optimizer"]), error_of(jobs["other size"])
    assert "this run's optimizer is not the one that was saved" in optimizer
    assert "in this run: exp_avg, exp_avg_sq, max_exp_avg_sq, step" in optimizer
    assert "--checkpoint.exclude_from_loading=optimizer,lr_scheduler" in optimizer
    assert "saved by 2 data-parallel ranks, this run has 1" in size
    assert "--checkpoint.exclude_from_loading=dataloader" in size
    for cured in ("new optimizer", "new data"):
        assert error_of(jobs[cured]) == ""
        assert started_at(jobs[cured]) == 5


def test_a_whole_resume_is_verified_and_says_so(jobs: dict[str, Job]) -> None:
    assert "tensors equal those that were saved in" in log_of(jobs["flipped"])


def test_a_run_does_not_start_anew_when_all_steps_are_damaged(jobs: dict[str, Job]) -> None:
    assert "no step can be resumed from" in error_of(jobs["all damaged"])
    assert "step-2: __0_0.distcp: has" in error_of(jobs["all damaged"])
    assert started_at(jobs["all damaged"]) == 1  # in the run before


def test_a_damaged_step_that_is_asked_for_by_name_is_an_error(jobs: dict[str, Job]) -> None:
    assert error_of(jobs["named"]).startswith("DamagedStepError")
    assert started_at(jobs["named"]) == 1  # in the run before


def test_a_whole_step_of_a_run_without_hooks_is_taken_and_gets_a_manifest(jobs: dict[str, Job]) -> None:
    job = jobs["unmarked"]
    assert error_of(job) == ""
    assert started_at(job) == 6
    assert "step-5 holds no average: it starts from the weights" in log_of(job)
    assert committed_steps(job.run / "checkpoint") == [2, 4, 5, 6]
    assert find_damage(job.run / "checkpoint" / "step-5") == []


def test_a_signal_on_one_rank_saves_the_step_that_all_are_at(jobs: dict[str, Job]) -> None:
    for name in ("was stopped", "kept"):
        assert (error_of(jobs[name], 0), error_of(jobs[name], 1)) == ("", "")
        assert "the run was asked to end" in log_of(jobs[name])
        assert "Training completed" in log_of(jobs[name])
    (step, *_) = committed_steps(jobs["stopped"].run / "checkpoint")
    assert 2 <= step < 6
    assert started_at(jobs["stopped"]) == step + 1
    last = jobs["kept"].run / "checkpoint" / f"step-{committed_steps(jobs['kept'].run / 'checkpoint')[-1]}"
    assert find_damage(last) == []


def test_what_a_signal_has_saved_goes_on_to_the_end_of_an_uninterrupted_run(jobs: dict[str, Job]) -> None:
    assert error_of(jobs["stopped"]) == ""
    both = [digests_of(jobs[name].run / "checkpoint" / "step-6") for name in ("stopped", "straight")]
    assert both[0] == both[1]
