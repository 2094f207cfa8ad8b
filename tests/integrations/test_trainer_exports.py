"""What comes out of Trainer's runs: directories that ``from_pretrained`` loads, live and from its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shardsmith.commands.options import ExportArguments
from shardsmith.commands.to_hf import default_output, to_hf
from shardsmith.formats.by_path import detect_checkpoint_format, model_names
from shardsmith.inspection import inspect_checkpoint
from tests.integrations.trainer_runs import CASES, STEPS, Case, assert_equal, make_model, run

Finished = Callable[[Case], Path]


def loaded(directory: Path) -> dict[str, Tensor]:
    """What a model holds that ``from_pretrained`` makes of a directory, without a complaint."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return dict(model.state_dict())


def make_base(kind: str, directory: Path) -> Path:
    model: Any = make_model(kind)
    model.config.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exports_are_at_their_own_steps_and_hold_what_trainer_has(finished: Finished, case: Case) -> None:
    exports = finished(case) / "out-hf"
    truth = torch.load(finished(case) / "truth.pt")
    assert sorted(path.name for path in exports.iterdir()) == ["step-3", "step-6"]
    assert_equal(loaded(exports / "step-6"), truth["main"])
    about = json.loads((exports / "step-6" / "shardsmith.json").read_text())
    assert (about["step"], about["ema"]["updates"]) == (6, 6)
    saved = finished(case) / "out" / "checkpoint-6" / "model.safetensors"
    if saved.exists():  # what Trainer's save_model writes
        ours, theirs = load_file(exports / "step-6" / "model.safetensors"), load_file(saved)
        assert theirs.keys() - ours.keys() <= {"lm_head.weight"}  # under FSDP, Trainer writes tied weights twice
        assert_equal(ours, {name: theirs[name] for name in ours})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_folder_converts_with_one_command_main_and_average(finished: Finished, case: Case, tmp_path: Path) -> None:
    folder = finished(case) / "out" / f"checkpoint-{STEPS}"
    truth = torch.load(finished(case) / "truth.pt")
    assert model_names(folder) == ["main", "ema"]
    base = make_base(case.kind, tmp_path / "base")
    export = ExportArguments(dtype="float32", ema_as="directory")
    assert to_hf(folder, base, export, tmp_path / "hf", quiet=True) == 0
    assert_equal(loaded(tmp_path / "hf"), truth["main"])
    assert_equal(loaded(tmp_path / "hf-ema"), truth["ema"])
    assert json.loads((tmp_path / "hf" / "shardsmith.json").read_text())["step"] == STEPS


def test_sharded_runs_of_the_past_convert_with_one_command(tmp_path: Path) -> None:
    case = Case(sharding="fsdp2", hooks={"ema_decay": None, "export": None, "dtype": None})
    run(case, tmp_path, detach=True)
    folder = tmp_path / "out" / f"checkpoint-{STEPS}"
    assert not (folder / "shardsmith").exists()
    assert to_hf(folder, make_base(case.kind, tmp_path / "base"), ExportArguments(dtype="float32"), quiet=True) == 0
    assert_equal(loaded(tmp_path / "out-hf" / f"checkpoint-{STEPS}"), torch.load(tmp_path / "truth.pt")["main"])


def test_the_default_output_is_where_no_trainer_looks_for_its_own() -> None:
    assert default_output(Path("/runs/out/checkpoint-500")) == Path("/runs/out-hf/checkpoint-500")


def test_a_folder_is_described_with_its_average(finished: Finished) -> None:
    folder = finished(CASES[0]) / "out" / "checkpoint-4"
    found = detect_checkpoint_format(folder)
    assert found.name == "accelerate"
    assert found.reason.endswith("shardsmith/ of step 4, an average")
    assert not inspect_checkpoint(folder, verify=True).damage
    assert not inspect_checkpoint(folder / "pytorch_model_fsdp_0", verify=True).damage
