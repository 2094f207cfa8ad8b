from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shardsmith.cli import main
from shardsmith.errors import CheckpointNotFoundError
from shardsmith.inspection import ModelSummary, inspect_checkpoint
from tests.trained_runs import STEP, Trained

Runs = dict[tuple[str, int], Trained]


@pytest.fixture
def checkpoint(odd: Trained, tmp_path: Path) -> Path:
    """A private copy."""
    return shutil.copytree(odd.checkpoint, tmp_path / "step-3")


def test_a_checkpoint_of_ours_is_described(trained: Runs) -> None:
    run = trained["qwen2", 2]
    found = inspect_checkpoint(run.checkpoint)
    tensors = {name: tensor for name, tensor in run.main.items() if name != "lm_head.weight"}
    elements = sum(tensor.numel() for tensor in tensors.values())
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    assert found.models == tuple(
        ModelSummary(name, len(tensors), elements, 4 * elements, {"float32": elements}, tied, 0)
        for name in ("main", "ema")
    )
    assert (found.format, found.step, found.world_size, found.damage) == ("sharded", STEP, 2, ())
    assert found.mesh == {"shape": [2], "dim_names": None}
    assert found.ema is not None
    assert found.ema["updates"] == STEP


def test_what_lies_beside_the_models_is_weighed(trained: Runs) -> None:
    beside = inspect_checkpoint(trained["qwen2", 2].checkpoint).beside
    assert beside.keys() == {"optimizer", "rng", "ema_state", "train_state"}
    assert beside["train_state"] == 8


def test_what_the_average_takes_from_main_is_counted(odd: Trained) -> None:
    main_model, average = inspect_checkpoint(odd.checkpoint).models
    assert (main_model.from_main, average.from_main) == (0, 6)
    assert average.dtypes == {"float32": 769, "int64": 1, "bool": 3, "float64": 3}


@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_a_plain_dcp_directory_is_described(layout: str, odd: Trained) -> None:
    found = inspect_checkpoint(odd.plain[layout])
    assert (found.format, found.step, found.damage) == ("dcp", None, ())
    assert [(model.name, model.tensors) for model in found.models] == [("main", len(odd.main))]
    assert found.beside.keys() == (set() if layout == "flat" else {"optim"})


@pytest.mark.parametrize("name", ["model.safetensors", "."])
def test_safetensors_are_described(name: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    found = inspect_checkpoint(tmp_path / name)
    assert found.models == (ModelSummary("main", 1, 3, 6, {"bfloat16": 3}, {}, 0),)
    assert found.files == {"model.safetensors": (tmp_path / "model.safetensors").stat().st_size}


def test_all_of_it_comes_back_from_json(odd: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(odd.checkpoint), "--json", "--verify"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = inspect_checkpoint(odd.checkpoint, verify=True)
    assert found.keys() == {*expected.__dataclass_fields__}
    assert found["models"][1] == {name: getattr(expected.models[1], name) for name in found["models"][1]}
    assert (found["damage"], found["verified"], found["step"]) == ([], True, STEP)


def test_a_flipped_bit_is_found_by_verify_alone(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray((checkpoint / "__1_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (checkpoint / "__1_0.distcp").write_bytes(data)
    assert main(["inspect", str(checkpoint)]) == 0
    assert "--verify reads every byte" in capsys.readouterr().out
    assert main(["inspect", str(checkpoint), "--verify"]) == 1
    printed = capsys.readouterr().out
    assert "problem __1_0.distcp: has changed since it was written" in printed
    assert "no problem" not in printed


def test_a_sound_checkpoint_is_said_to_be_sound(odd: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(odd.checkpoint), "--verify"]) == 0
    assert "no problem found in any byte of its files" in capsys.readouterr().out


def test_verify_does_not_claim_what_it_cannot_know(odd: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(odd.plain["flat"]), "--verify"]) == 2
    assert "no hashes of its files are recorded" in capsys.readouterr().out
    assert not inspect_checkpoint(odd.plain["flat"], verify=True).verified


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "__1_0.distcp"])
@pytest.mark.parametrize("json_option", [[], ["--json"]], ids=["table", "json"])
def test_a_missing_file_is_a_problem(
    file: str, json_option: list[str], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / file).unlink()
    assert main(["inspect", str(checkpoint), *json_option]) == 1
    assert file in capsys.readouterr().out


def test_what_is_no_checkpoint_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert main(["inspect", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "none of its 1 entries is a weights file" in printed
    assert "is no checkpoint of a known format" in printed


def test_nothing_at_all_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointNotFoundError):
        inspect_checkpoint(tmp_path / "x")
    assert main(["inspect", str(tmp_path / "x")]) == 2
    assert "there is no such file or directory" in capsys.readouterr().err


def test_names_that_look_like_markup_are_printed_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "[red]:key:[" / "x[bold].safetensors"
    path.parent.mkdir()
    save_file({"[/a]": torch.zeros(1)}, path)
    assert main(["inspect", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    os.truncate(path, 20)
    assert main(["inspect", str(path)]) == 1
    assert f"problem {path}" in capsys.readouterr().out
