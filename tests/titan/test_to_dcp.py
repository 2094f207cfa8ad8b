"""``to-dcp --layout torchtitan``: what TorchTitan itself makes of a model directory, and starts from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shardsmith.cli import main
from shardsmith.formats.by_path import open_source
from shardsmith.integrations.torchtitan.models import TitanModel, build_titan_model
from shardsmith.manifest.metadata import read_metadata
from shardsmith.tensors.fqn import tied_weights
from shardsmith.tensors.tensors import read_tensor
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
    config = {"architectures": ["X"], "tie_word_embeddings": bool(tied_weights(titan.model))}
    (directory / "config.json").write_text(json.dumps(config))
    files = {name: value.clone() for name, value in titan.adapter.to_hf(made_up(titan)).items()}
    save_file(files, directory / "model.safetensors")
    return files


def convert(titan: TitanModel, source: Path, checkpoint: Path, *options: str) -> int:
    model, flavor = titan.title.split("/")
    names = ["--layout", "torchtitan", "--titan_model", model, "--titan_flavor", flavor]
    return main(["to-dcp", "--model", str(source), "--checkpoint", str(checkpoint), *names, *options])


def convert_back(titan: TitanModel, checkpoint: Path, base: Path, output: Path) -> dict[str, Tensor]:
    """What the Hugging Face directory of a checkpoint holds."""
    model, flavor = titan.title.split("/")
    places = ["--checkpoint_dir", str(checkpoint), "--base_model_path", str(base), "--output_dir", str(output)]
    names = ["--titan_model", model, "--titan_flavor", flavor]
    assert main(["to-hf", *places, *names, "--dtype", "original", "--quiet"]) == 0
    return load_file(output / "model.safetensors")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("title", TITLES)
def test_it_holds_what_the_adapter_reads_from_the_files_and_comes_back(title: str, tmp_path: Path) -> None:
    titan = build_titan_model(title)
    files = save_directory(titan, tmp_path / "hf")
    expected = titan.adapter.from_hf(dict(files))
    assert convert(titan, tmp_path / "hf", tmp_path / "dcp", "--quiet") == 0
    found = open_source(tmp_path / "dcp")
    assert {**found.specs, **found.aliases}.keys() == titan.model.state_dict().keys()
    for name, value in expected.items():
        assert torch.equal(read_tensor(found, found.aliases.get(name, name)), value), name
    assert read_metadata(tmp_path / "dcp").initial.names == f"torchtitan:{title}"
    assert_same(convert_back(titan, tmp_path / "dcp", tmp_path / "hf", tmp_path / "back"), files)


def test_a_directory_without_one_of_the_tensors_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    titan = build_titan_model("deepseek_v3/debugmodel")
    save_directory(titan, tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if "correction_bias" not in name}
    save_file(kept, path)
    assert convert(titan, tmp_path / "hf", tmp_path / "dcp") == 2
    assert "e_score_correction_bias: not in the files" in capsys.readouterr().err


def test_torchtitan_starts_from_it_and_it_comes_back_byte_for_byte(assets: Assets, tmp_path: Path) -> None:
    titan = build_titan_model("llama3/small")
    expected = save_directory(titan, tmp_path / "hf")
    assert convert(titan, tmp_path / "hf", tmp_path / "dcp", "--quiet") == 0
    start = [f"--checkpoint.initial_load_path={tmp_path / 'dcp'}", "--checkpoint.initial_load_model_only"]
    run_jobs(assets, 2, tmp_path, Job(run=tmp_path / "run", options=[*start, STILL]))
    step = tmp_path / "run" / "checkpoint" / "step-2"
    assert_same(convert_back(titan, step, tmp_path / "hf", tmp_path / "out"), expected)
