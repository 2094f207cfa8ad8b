"""attach(accelerator, hooks) on real loops of accelerate, on real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integrations.accelerate_runs import run_loop
from tests.integrations.trainer_runs import assert_close, assert_equal, averaged
from tests.ranks import run_on_ranks


@pytest.mark.parametrize(("sharding", "ranks"), [("fsdp2", 1), ("fsdp2", 2), ("ddp", 2)])
def test_what_two_ranks_saved_comes_back_with_its_average_on_any_number(
    tmp_path: Path, sharding: str, ranks: int
) -> None:
    run_on_ranks(run_loop, 2, tmp_path, sharding, tmp_path, 4, None, "saved.pt")
    run_on_ranks(run_loop, ranks, tmp_path, sharding, tmp_path, 4, "state-4", "loaded.pt")
    saved, loaded = torch.load(tmp_path / "saved.pt"), torch.load(tmp_path / "loaded.pt")
    assert loaded["step"] == 4
    assert_close(saved["ema"], averaged(saved["history"]))
    assert_equal(loaded["main"], saved["main"])
    assert_equal(loaded["ema"], saved["ema"])
