"""``to-dcp --layout torchtitan``: what TorchTitan itself makes of a model directory, and starts from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shardsmith.cli import main
from shardsmith.formats import open_source
from shardsmith.integrations.torchtitan.models import TitanModel, build_titan_model
from shardsmith.metadata import read_metadata
from shardsmith.names import tied_weights
from shardsmith.tensors import read_tensor
from tests.titan.cpu import IS_0_3
from tests.titan.jobs import Assets, Job, run_jobs

STILL = "--config=llama3_still" if IS_0_3 else "--optimizer.lr=0"
TITLES = ["llama3/debugmodel", "qwen3/debugmodel", "deepseek_v3/debugmodel"]


def made_up(titan: TitanModel) -> dict[str, Tensor]:
    torch.manual_seed(0)
    values = {name: torch.randn(tensor.shape) / 16 for name, tensor in titan.model.state_dict().items()}
    return values | {alias: values[kept] for alias, kept in tied_weights(titan.model).items()}


def save_directory(titan: TitanModel, directory: Path) -> dict[str, Tensor]:
    """A model directory with random weights; what it holds."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "x", "architectures": ["X"]}))
    files = {name: value.clone() for name, value in titan.adapter.to_hf(made_up(titan)).items()}
    save_file(files, directory / "model.safetensors")
    return files


def convert(titan: TitanModel, source: Path, checkpoint: Path, *options: str) -> int:
    model, flavor = titan.title.split("/")
    names = ["--layout", "torchtitan", "--titan_model", model, "--titan_flavor", flavor]
    return main(["to-dcp", "--model", str(source), "--checkpoint", str(checkpoint), *names, *options])


@pytest.mark.parametrize("title", TITLES)
def test_it_holds_what_the_adapter_reads_from_the_files(title: str, tmp_path: Path) -> None:
    titan = build_titan_model(title)
    expected = titan.adapter.from_hf(save_directory(titan, tmp_path / "hf"))
    assert convert(titan, tmp_path / "hf", tmp_path / "dcp", "--quiet") == 0
    found = open_source(tmp_path / "dcp")
    assert {**found.specs, **found.aliases}.keys() == titan.model.state_dict().keys()
    for name, value in expected.items():
        assert torch.equal(read_tensor(found, found.aliases.get(name, name)), value), name
    assert read_metadata(tmp_path / "dcp").initial.names == f"torchtitan:{title}"


def test_a_directory_without_one_of_the_tensors_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    titan = build_titan_model("deepseek_v3/debugmodel")
    save_directory(titan, tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if "correction_bias" not in name}
    save_file(kept, path)
    assert convert(titan, tmp_path / "hf", tmp_path / "dcp") == 2
    assert "e_score_correction_bias: not in the files" in capsys.readouterr().err


def test_torchtitan_starts_from_it_and_it_comes_back_byte_for_byte(assets: Assets, tmp_path: Path) -> None:
    titan = build_titan_model("llama3/debugmodel")
    expected = save_directory(titan, tmp_path / "hf")
    assert convert(titan, tmp_path / "hf", tmp_path / "dcp", "--quiet") == 0
    start = [f"--checkpoint.initial_load_path={tmp_path / 'dcp'}", "--checkpoint.initial_load_model_only"]
    run_jobs(assets, 2, tmp_path, Job(run=tmp_path / "run", options=[*start, STILL]))
    places = {"checkpoint_dir": tmp_path / "run" / "checkpoint" / "step-2", "base_model_path": tmp_path / "hf"}
    options = [text for name, value in places.items() for text in (f"--{name}", str(value))]
    names = ["--titan_model", "llama3", "--titan_flavor", "debugmodel"]
    assert main(["to-hf", *options, *names, "--output_dir", str(tmp_path / "out"), "--dtype", "original"]) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
