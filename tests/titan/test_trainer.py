"""That the tests have the real thing: TorchTitan itself, training on CPU ranks."""

from __future__ import annotations

from pathlib import Path

import torchtitan

from shardsmith.formats.by_path import DCP, detect_checkpoint_format
from tests.titan.jobs import Assets, Job, error_of, log_of, run_jobs


def test_torchtitan_trains_and_saves_on_two_ranks(assets: Assets, tmp_path: Path) -> None:
    job = Job(run=tmp_path / "run")
    run_jobs(assets, 2, tmp_path, job)
    assert error_of(job) == ""
    assert log_of(job).count("loss:") == 4
    assert [detect_checkpoint_format(job.run / "checkpoint" / f"step-{step}").name for step in (2, 4)] == [DCP, DCP]
    assert torchtitan.__file__.endswith("site-packages/torchtitan/__init__.py")
