"""CheckpointHooks on the real Trainer of transformers, on real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integrations.trainer_runs import RESUMED, STEPS, Case, averaged, run

CASES = [
    Case(sharding="fsdp2", accumulation=4),
    Case(sharding="fsdp2-full", kind="qwen2"),
    Case(sharding="fsdp1", kind="qwen2"),
    Case(sharding="fsdp1-full"),
    Case(sharding="fsdp2", kind="moe"),
    Case(sharding="ddp", accumulation=4),
    Case(sharding="ddp", kind="moe"),
    Case(sharding="none", ranks=1, kind="qwen2", accumulation=4),
    Case(sharding="none", ranks=1, kind="moe"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_resumed_run_ends_as_the_uninterrupted_one_with_the_average_of_the_formula(
    tmp_path: Path, case: Case
) -> None:
    run(case, tmp_path / "straight")
    straight = torch.load(tmp_path / "straight" / "truth.pt")
    expected = averaged(straight["history"])
    for name, found in straight["ema"].items():
        torch.testing.assert_close(found.double(), expected[name], rtol=1e-6, atol=1e-7)
    run(case, tmp_path / "straight", resume=str(tmp_path / "straight" / "out" / f"checkpoint-{RESUMED}"), name="resumed.pt")
    resumed = torch.load(tmp_path / "straight" / "resumed.pt")
    assert len(resumed["history"]) == STEPS - RESUMED + 1
    for model in ("main", "ema"):
        assert all(torch.equal(value, straight[model][name]) for name, value in resumed[model].items())
