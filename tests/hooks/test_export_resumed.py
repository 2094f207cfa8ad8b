"""A run that was resumed passes steps once more that it had exported before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from shardsmith.errors import ShardsmithError
from shardsmith.hf.export_files import find_export_damage
from shardsmith.hooks import HFExport, every


def export_once(directory: Path, model: nn.Module) -> None:
    hook = HFExport(directory, model=model, when=every(1))
    hook.on_step_end(1)
    hook.close()


def test_an_export_of_before_is_kept_and_does_not_stop_the_run(tmp_path: Path) -> None:
    export_once(tmp_path, nn.Linear(3, 3))
    before = (tmp_path / "step-1" / "model.safetensors").read_bytes()
    export_once(tmp_path, nn.Linear(3, 3))
    assert (tmp_path / "step-1" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_what_is_no_export_of_ours_is_an_error_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / "notes.txt").write_text("mine")
    with pytest.raises(ShardsmithError, match="step-1"):
        export_once(tmp_path, nn.Linear(3, 3, dtype=torch.float64))
    assert [path.name for path in (tmp_path / "step-1").iterdir()] == ["notes.txt"]


def begin(directory: Path, step: int) -> None:
    hook = HFExport(directory, model=nn.Linear(3, 3), when=every(2))
    hook.on_train_begin(step)
    hook.close()


@pytest.mark.parametrize(("step", "made"), [(0, set()), (3, set()), (4, {"step-4"})])
def test_a_run_that_died_before_an_export_makes_it_when_it_comes_back(
    tmp_path: Path, step: int, made: set[str]
) -> None:
    begin(tmp_path, step)
    assert {path.name for path in tmp_path.iterdir()} == made


def test_an_export_that_is_there_when_the_run_comes_back_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begin(tmp_path, 4)
    before = (tmp_path / "step-4" / "model.safetensors").read_bytes()
    begin(tmp_path, 4)
    assert (tmp_path / "step-4" / "model.safetensors").read_bytes() == before
    assert not caplog.text


def test_an_export_that_a_death_cut_off_is_named_when_the_run_goes_on_after_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leftovers = [tmp_path / f".{name}.tmp-{0:016x}" for name in ("step-2", "step-4", "step-6", "stepwise-2")]
    for path in leftovers:
        path.mkdir()
    begin(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"{tmp_path}: the export of step 2 was cut off with the former run, and this one goes on from step 4; "
        "`shardsmith to-hf` makes it of a checkpoint"
    ]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda path: path.write_bytes(bytes([*path.read_bytes()[:-1], path.read_bytes()[-1] ^ 1])),
    "a cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "deleted": Path.unlink,
}


NAMES = ("model.safetensors", "config.json", "shardsmith.json")


@pytest.mark.parametrize(
    ("kind", "name"),  # without shardsmith.json, and without another export of ours, it could be anybody's folder
    [(kind, name) for kind in DAMAGE for name in NAMES if (kind, name) != ("deleted", "shardsmith.json")],
)
def test_a_damaged_export_is_set_aside_and_made_anew_when_the_run_comes_back(
    tmp_path: Path, kind: str, name: str
) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    export_once(tmp_path, model)
    before = {path.name: path.read_bytes() for path in (tmp_path / "step-1").iterdir()}
    DAMAGE[kind](tmp_path / "step-1" / name)
    assert find_export_damage(tmp_path / "step-1")
    hook = HFExport(tmp_path, model=model, when=every(1))
    hook.on_train_begin(1)
    hook.close()
    assert find_export_damage(tmp_path / "step-1") == []
    after = {path.name: path.read_bytes() for path in (tmp_path / "step-1").iterdir()}
    assert after.keys() == before.keys()
    assert after["model.safetensors"] == before["model.safetensors"]
    aside = [path for path in tmp_path.iterdir() if path.name != "step-1"]
    assert len(aside) == 1
    assert aside[0].name.startswith(".step-1.")
