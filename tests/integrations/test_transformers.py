"""CheckpointHooks on the real Trainer of transformers, on real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integrations.trainer_runs import RESUMED, STEPS, Case, assert_close, assert_equal, averaged, run

CASES = [
    Case(sharding="fsdp2", accumulation=4),
    Case(sharding="fsdp2-full", kind="qwen2"),
    Case(sharding="fsdp2", kind="moe"),
    Case(sharding="fsdp1", kind="qwen2"),
    Case(sharding="ddp", accumulation=4),
    Case(sharding="ddp", kind="moe"),
    Case(sharding="none", ranks=1, kind="qwen2", accumulation=4),
    Case(sharding="none", ranks=1, kind="moe"),
]
FORGETFUL = ("fsdp1",)
"""Where Trainer and accelerate alone do not give back the optimizer's state: they ask an empty one what to load."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_resumed_run_ends_as_the_uninterrupted_one_with_the_average_of_the_formula(
    tmp_path: Path, case: Case
) -> None:
    run(case, tmp_path)
    run(case, tmp_path, resume=str(tmp_path / "out" / f"checkpoint-{RESUMED}"), name="resumed.pt")
    straight, resumed = torch.load(tmp_path / "truth.pt"), torch.load(tmp_path / "resumed.pt")
    assert_close(straight["ema"], averaged(straight["history"]))
    assert len(resumed["history"]) == STEPS - RESUMED + 1
    assert_equal(resumed["history"][0], straight["history"][RESUMED])
    assert_close(resumed["ema"], averaged(straight["history"][: RESUMED + 1] + resumed["history"][1:]))
    if case.sharding not in FORGETFUL:
        assert_equal(resumed["main"], straight["main"])
        assert_equal(resumed["ema"], straight["ema"])
