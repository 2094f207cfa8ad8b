"""What a user adds on the command line: modules that bring model classes, and flags of the trainer."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from shardsmith.cli import main
from shardsmith.diagnose.training_settings import TrainingSettings
from shardsmith.errors import UsageError
from tests import dcp_directories
from tests.forked import run_python

OWN = """
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
AutoConfig.register("own_llama", OwnConfig)
AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM)
"""
"""A package such as fla: what brings a model class to transformers when it is imported."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of that class, whose directory brings no code."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "model_type": "own_llama", "architectures": ["OwnForCausalLM"]}))
    (tmp_path / "own_models.py").write_text(OWN)
    return tmp_path / "model"


def run(model: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, in whose working folder the package lies."""
    return run_python("-m", "shardsmith", *arguments, cwd=model.parent)


def test_a_class_of_another_package_is_run_once_it_is_imported(model: Path) -> None:
    checkpoint = model.parent / "dcp"
    converted = run(model, "to-dcp", "--base-model", str(model), "--output-dir", "dcp", "--import", "own_models")
    assert converted.returncode == 0, converted.stderr
    asked = ["diagnose", "--checkpoint", str(checkpoint), "--base-model", str(model), "--json"]
    without, found = run(model, *asked), run(model, *asked, "--import", "own_models")
    (reason,) = json.loads(without.stdout)["inapplicable"]
    assert reason.startswith("logits: transformers has no class for the model_type 'own_llama'")
    looked = json.loads(found.stdout)
    assert (found.returncode, looked["inapplicable"]) == (0, [])
    assert looked["facts"]["model"]["largest difference of a logit"] == 0


def test_a_module_that_cannot_be_imported_is_named(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["diagnose", "--checkpoint", str(model), "--base-model", str(model), "--import", "no_such_package"]
    assert main(asked) == 2
    assert "--import no_such_package: ModuleNotFoundError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "section", "name", "value"),
    [
        ("checkpoint.initial_load_path=/x", "checkpoint", "initial_load_path", "/x"),
        ("--checkpoint.initial-load-path=/x=y", "checkpoint", "initial_load_path", "/x=y"),
        ("checkpoint.enable", "checkpoint", "enable", True),
        ("--checkpoint.no-enable", "checkpoint", "enable", False),
        ("checkpoint.enable=FALSE", "checkpoint", "enable", False),
        ("model.name=llama3", "model", "name", "llama3"),
    ],
)
def test_flags_stand_in_for_settings(flag: str, section: str, name: str, value: Any) -> None:
    before = {"checkpoint": {"enable": None, "folder": "f"}}
    after = TrainingSettings(Path("train.toml"), before).with_flags([flag]).content
    assert after[section][name] == value
    assert after["checkpoint"]["folder"] == "f"
    assert before["checkpoint"] == {"enable": None, "folder": "f"}


@pytest.mark.parametrize("flag", ["enable", "checkpoint.=x", ".name=x", "=", ""])
def test_what_is_no_flag_is_refused(flag: str) -> None:
    with pytest.raises(UsageError, match=r"write section\.name=value"):
        TrainingSettings(Path("train.toml"), {}).with_flags([flag])


def test_a_flag_says_which_checkpoint_the_trainer_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """flame is told on its command line; its file says only the rest."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    right = dcp_directories.save(dict(model.state_dict()), tmp_path / "right")
    shutil.copytree(right, tmp_path / "other")
    settings = tmp_path / "train.toml"
    settings.write_text("[checkpoint]\nfolder = 'none'\n")
    asked = ["diagnose", "--checkpoint", str(right), "--base-model", str(tmp_path / "model"), "--json"]
    asked += ["--level", "model", "--training-config", str(settings)]
    codes = {}
    for name in ("right", "other"):
        flags = ["--training-flags", "checkpoint.enable", f"checkpoint.initial_load_path={tmp_path / name}"]
        main([*asked, *flags])
        codes[name] = {finding["code"] for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert "another-checkpoint-loaded" in codes["other"]
    assert codes["other"] - codes["right"] == {"another-checkpoint-loaded"}


def test_a_flag_of_a_section_that_is_a_value_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.toml").write_text("checkpoint = 5")
    settings = TrainingSettings.read(tmp_path / "train.toml")
    with pytest.raises(UsageError, match=r"checkpoint\.enable: in .* checkpoint is 5, and no section"):
        settings.with_flags(["--checkpoint.enable"])


def test_weights_of_no_known_class_still_compare(tmp_path: Path) -> None:
    """Without the package that has the class, names and values are compared, and it is said that nothing was run."""
    weights = {"a.weight": torch.ones(4, 4)}
    (base := tmp_path / "base").mkdir()
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps({"model_type": "of_nobody"}))
    checkpoint = dcp_directories.save(weights, tmp_path / "dcp")
    assert main(["diagnose", "--checkpoint", str(checkpoint), "--base-model", str(base), "--level", "values"]) == 0
