"""Trainer's own habits around our directories: kills, rotation, the best model, folders without ours, refusals."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from shardsmith.errors import UsageError
from shardsmith.hooks import every
from shardsmith.integrations.transformers import CheckpointHooks, last_checkpoint
from shardsmith.manifest.companion import find_folder_damage
from tests.integrations.test_trainer_exports import loaded
from tests.integrations.trainer_runs import (
    CASES,
    STEPS,
    Case,
    assert_close,
    assert_equal,
    averaged,
    flip,
    make_data,
    make_model,
    run,
)
from tests.unreadable import UNREADABLE

Finished = Callable[[Case], Path]
SHARDED = CASES[0]
ALONE = Case(sharding="none", ranks=1, kind="qwen2", accumulation=4)


def steps_in(directory: Path, prefix: str) -> list[int]:
    return sorted(int(path.name.removeprefix(prefix)) for path in directory.iterdir() if path.name.startswith(prefix))


def test_a_killed_run_goes_on_from_its_last_complete_folder_as_if_nothing_had_happened(
    finished: Finished, tmp_path: Path
) -> None:
    with pytest.raises(ProcessExitedException):
        run(SHARDED, tmp_path, kill_after=5)
    resume = last_checkpoint(tmp_path / "out", verify=True)
    # the folder of step 4 is marked in the background, and the kill may have been faster
    marked = [step for step in (2, 4) if (tmp_path / "out" / f"checkpoint-{step}" / "shardsmith").is_dir()]
    assert marked in ([2], [2, 4])
    assert resume == str(tmp_path / "out" / f"checkpoint-{marked[-1]}")
    run(SHARDED, tmp_path, resume=resume)
    straight, resumed = torch.load(finished(SHARDED) / "truth.pt"), torch.load(tmp_path / "truth.pt")
    assert_equal(resumed["main"], straight["main"])
    assert_equal(resumed["ema"], straight["ema"])


def test_a_newest_folder_that_is_damaged_or_renamed_is_passed_over_and_said_so(
    finished: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(finished(ALONE) / "out", tmp_path / "out")
    newest, before = (tmp_path / "out" / f"checkpoint-{step}" for step in (STEPS, STEPS - 2))
    shutil.copytree(before, copied := before.with_name(f"checkpoint-{STEPS + 3}"))
    flip(newest / "model.safetensors")
    resume = last_checkpoint(tmp_path / "out", verify=True)
    assert resume == str(before)
    said = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert sorted(line.split(" is passed over: ")[0] for line in said) == sorted(map(str, (newest, copied)))
    assert any("is of step 4, not of step 9: it was copied or renamed" in line for line in said)
    shutil.rmtree(newest)
    shutil.rmtree(copied)
    run(ALONE, tmp_path, resume=resume)
    straight, resumed = torch.load(finished(ALONE) / "truth.pt"), torch.load(tmp_path / "truth.pt")
    assert_equal(resumed["main"], straight["main"])
    assert_equal(resumed["ema"], straight["ema"])


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_no_folder_is_passed_over_and_makes_way_for_its_step(
    finished: Finished, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    put, reason = UNREADABLE[kind]
    shutil.copytree(finished(ALONE) / "out", tmp_path / "out")
    newest, before = (tmp_path / "out" / f"checkpoint-{step}" for step in (STEPS, STEPS - 2))
    shutil.rmtree(newest)
    put(newest)
    resume = last_checkpoint(tmp_path / "out", verify=True)
    assert resume == str(before)
    (said,) = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert said.startswith(f"{newest} is passed over: it ")
    assert reason.removeprefix("cannot be read: ") in said
    run(ALONE, tmp_path, resume=resume)  # Trainer itself ends at such a name
    assert find_folder_damage(newest) == []
    straight, resumed = torch.load(finished(ALONE) / "truth.pt"), torch.load(tmp_path / "truth.pt")
    assert_equal(resumed["main"], straight["main"])
    assert_equal(resumed["ema"], straight["ema"])


def test_a_run_that_is_told_to_end_saves_its_step_and_goes_on_from_there(finished: Finished, tmp_path: Path) -> None:
    case = replace(ALONE, hooks={"stop_on": signal.SIGTERM})
    run(case, tmp_path, kill_after=2, kill_with=signal.SIGTERM)
    assert steps_in(tmp_path / "out", "checkpoint-") == [2, 3]
    resume = last_checkpoint(tmp_path / "out", verify=True)
    assert resume == str(tmp_path / "out" / "checkpoint-3")
    run(case, tmp_path, resume=resume)
    straight, resumed = torch.load(finished(ALONE) / "truth.pt"), torch.load(tmp_path / "truth.pt")
    assert_equal(resumed["main"], straight["main"])
    assert_equal(resumed["ema"], straight["ema"])


def test_folders_that_are_written_over_are_whole_again(finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished(SHARDED) / "out", tmp_path / "out")
    run(SHARDED, tmp_path, resume=str(tmp_path / "out" / "checkpoint-2"))
    assert steps_in(tmp_path / "out", "checkpoint-") == [2, 4, 6]
    assert [find_folder_damage(tmp_path / "out" / f"checkpoint-{step}") for step in (2, 4, 6)] == [[], [], []]


def test_rotation_takes_our_directories_along_and_leaves_exports_alone_also_those_in_flight(tmp_path: Path) -> None:
    arguments = {"save_steps": 1, "save_total_limit": 2}
    run(Case(sharding="fsdp2", arguments=arguments), tmp_path, hold_exports_until=STEPS)
    assert steps_in(tmp_path / "out", "checkpoint-") == [STEPS - 1, STEPS]
    assert all(find_folder_damage(tmp_path / "out" / f"checkpoint-{step}") == [] for step in (STEPS - 1, STEPS))
    assert steps_in(tmp_path / "out-hf", "step-") == [3, 6]
    assert all((tmp_path / "out-hf" / f"step-{step}" / "processor.txt").is_file() for step in (3, 6))


def test_the_best_model_has_the_average_of_its_own_step_and_the_last_step_is_exported(tmp_path: Path) -> None:
    best: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    case = Case(sharding="fsdp2", arguments={**best, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1})
    run(case, tmp_path)
    truth = torch.load(tmp_path / "truth.pt")
    (step,) = steps_in(tmp_path / "out", "checkpoint-")  # of so few steps the greatest loss is not the last
    assert step < STEPS
    assert_equal(truth["main"], truth["history"][step])
    assert_close(truth["ema"], averaged(truth["history"][: step + 1]))
    assert_equal(loaded(tmp_path / "out-hf" / f"step-{STEPS}"), truth["history"][STEPS])
    assert steps_in(tmp_path / "out-hf", "step-") == [3, STEPS]


def test_only_the_model_can_be_saved(tmp_path: Path) -> None:
    run(Case(sharding="ddp", arguments={"save_only_model": True}), tmp_path)
    assert find_folder_damage(tmp_path / "out" / f"checkpoint-{STEPS}") == []
    assert not (tmp_path / "out" / f"checkpoint-{STEPS}" / "optimizer.pt").exists()


def test_a_folder_without_our_mark_is_passed_over_refused_or_taken_as_it_is(finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished(ALONE) / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-6" / "shardsmith")
    (tmp_path / "out" / "checkpoint-4" / "shardsmith").rename(tmp_path / "out" / "checkpoint-4" / ".shardsmith.tmp-0")
    assert last_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-2")
    resume = str(tmp_path / "out" / "checkpoint-4")
    with pytest.raises(ProcessRaisedException, match=r"checkpoint-4: has no complete shardsmith/ directory"):
        run(ALONE, tmp_path, resume=resume)
    lenient = replace(ALONE, hooks={"on_missing": "start"})
    run(lenient, tmp_path, resume=resume)
    truth = torch.load(tmp_path / "truth.pt")
    assert_close(truth["ema"], averaged(truth["history"]))


def test_weights_that_changed_on_disk_are_found_although_trainer_loads_them(finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished(ALONE) / "out" / "checkpoint-4", tmp_path / "out" / "checkpoint-4")
    weights = tmp_path / "out" / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ProcessRaisedException, match=r"1 of \d+ tensors of the live model are not what was saved"):
        run(ALONE, tmp_path, resume=str(weights.parent))
    assert last_checkpoint(tmp_path / "out", verify=True) is None


def test_evaluation_with_the_average_gives_the_weights_back(tmp_path: Path) -> None:
    run(Case(sharding="fsdp2", arguments={"max_steps": 2}), tmp_path, finish=evaluate_both)
    losses = torch.load(tmp_path / "losses.pt")
    assert losses["before"] == losses["after"] != losses["swapped"]
    model: Any = make_model("llama").eval()
    model.load_state_dict(torch.load(tmp_path / "truth.pt")["ema"])
    batch = {name: torch.stack([row[name] for row in make_data()[:4]]) for name in ("input_ids", "labels")}
    with torch.no_grad():
        assert losses["swapped"] == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def evaluate_both(trainer: Any, hooks: CheckpointHooks, directory: Path) -> None:
    losses = {"before": trainer.evaluate()["eval_loss"]}
    with hooks.swapped_in():
        losses["swapped"] = trainer.evaluate()["eval_loss"]
    losses["after"] = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        torch.save(losses, directory / "losses.pt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"export": every(1), "dtpye": "float32"}, "dtpye: there is no such option; did you mean dtype"),
        ({"dtype": "float32"}, "export= does not say when"),
        ({"ema_options": {"warmup": True}}, "no ema_decay"),
        (
            {"export": 500},
            r"CheckpointHooks: export=500: a Schedule or None is expected; write every\(500\)|write every",
        ),
        ({"ema_decay": "0.9"}, "ema_decay='0.9': a number"),
        (
            {"ema_decay": 0.9, "ema_options": {"deacy": 0.9}},
            "ema_options: deacy: there is no such option; did you mean",
        ),
        ({"export": every(1), "keep": 3}, r"keep=3: a Retention is expected; write latest\(3\)"),
        ({"export": every(1), "models": "each"}, "models='each': \"main\" or"),
        ({"export": every(1), "export_dir": "nowhere://bucket/hf"}, "nowhere:// is not supported"),
        ({"on_missing": "begin"}, 'on_missing=\'begin\': "raise" or "start" is expected'),
        ({"stop_on": "SIGTERM"}, "write signal.SIGTERM"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CheckpointHooks(**options)


@pytest.mark.parametrize(("deepspeed", "search"), [({"stage": 3}, False), (None, True)])
def test_what_is_not_supported_is_refused_when_training_begins(deepspeed: Any, search: bool) -> None:
    args, state = SimpleNamespace(deepspeed=deepspeed, output_dir="out"), SimpleNamespace(is_hyper_param_search=search)
    with pytest.raises(UsageError, match="neither under DeepSpeed nor in a hyperparameter search"):
        CheckpointHooks().on_train_begin(args, state, None, model=make_model("llama"))


def test_exports_where_trainer_rotates_are_refused(tmp_path: Path) -> None:
    case = replace(ALONE, hooks={"export_dir": tmp_path / "out" / "checkpoint-exports"})
    with pytest.raises(ProcessRaisedException, match="Trainer deletes old folders of such names"):
        run(case, tmp_path)
