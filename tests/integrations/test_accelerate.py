"""attach(accelerator, hooks) on real loops of accelerate, on real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardsmith.commands.options import ExportArguments
from shardsmith.commands.to_hf import to_hf
from shardsmith.integrations.accelerate import last_checkpoint
from shardsmith.manifest.companion import find_folder_damage
from tests.integrations.accelerate_runs import run_average_that_starts, run_loop, run_named_by_accelerate
from tests.integrations.test_trainer_exports import loaded, make_base
from tests.integrations.trainer_runs import assert_close, assert_equal, averaged, flip
from tests.ranks import run_on_ranks
from tests.unreadable import UNREADABLE


@pytest.mark.parametrize(("sharding", "ranks"), [("fsdp2", 1), ("ddp", 2)])
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


@pytest.mark.parametrize(("sharding", "ranks"), [("fsdp2", 2), ("ddp", 2), ("none", 1)])
def test_folders_and_exports_are_what_from_pretrained_loads(tmp_path: Path, sharding: str, ranks: int) -> None:
    run_on_ranks(run_loop, ranks, tmp_path, sharding, tmp_path, 2, None, "truth.pt")
    truth = torch.load(tmp_path / "truth.pt")
    assert_equal(loaded(tmp_path / "hf" / "step-2"), truth["main"])
    folder = tmp_path / "state-2"
    assert find_folder_damage(folder) == []
    base = make_base("qwen2", tmp_path / "base")
    export = ExportArguments(dtype="float32", ema_as="directory")
    assert to_hf(folder, base, export, tmp_path / "converted", quiet=True) == 0
    assert_equal(loaded(tmp_path / "converted"), truth["main"])
    assert_equal(loaded(tmp_path / "converted-ema"), truth["ema"])


def test_folders_that_accelerate_names_and_deletes_have_ours_in_them_until_it_is_removed(tmp_path: Path) -> None:
    run_on_ranks(run_named_by_accelerate, 1, tmp_path, tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint_3", "checkpoint_4"]


def test_a_newest_folder_that_is_damaged_is_passed_over_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_on_ranks(run_loop, 1, tmp_path, "none", tmp_path, 4, None, "straight.pt")
    flip(max((tmp_path / "state-4").glob("*.safetensors"), key=lambda file: file.stat().st_size))
    assert last_checkpoint(tmp_path, verify=True) == str(tmp_path / "state-2")
    (said,) = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert said.startswith(
        f"{tmp_path / 'state-4'} is passed over: model.safetensors: has changed since it was written"
    )
    (tmp_path / "again").mkdir()
    run_on_ranks(
        run_loop, 1, tmp_path / "again", "none", tmp_path / "again", 4, str(tmp_path / "state-2"), "resumed.pt"
    )
    straight, resumed = torch.load(tmp_path / "straight.pt"), torch.load(tmp_path / "again" / "resumed.pt")
    assert_equal(resumed["main"], straight["main"])
    assert_equal(resumed["ema"], straight["ema"])


def test_a_loop_without_an_average_gets_one_where_it_goes_on(tmp_path: Path) -> None:
    for is_new in (True, False):
        run_on_ranks(run_average_that_starts, 2, tmp_path, tmp_path, is_new)


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_name_that_is_no_folder_is_passed_over_and_makes_way(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    put, _ = UNREADABLE[kind]
    for step in (2, 4):
        put(tmp_path / f"step_{step}")
        put(tmp_path / f"state-{step}")
    assert last_checkpoint(tmp_path) is None
    said = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert any(line.startswith(f"{tmp_path / 'step_2'} is passed over: it ") for line in said)
    run_on_ranks(run_loop, 1, tmp_path, "none", tmp_path, 4, None, "straight.pt")
    assert last_checkpoint(tmp_path, verify=True) == str(tmp_path / "state-4")
