"""``to-hf`` on what TorchTitan itself saved of its own models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from shardsmith.cli import main
from shardsmith.formats.by_path import open_source
from shardsmith.tensors.tensors import read_tensor
from tests.dcp_directories import save
from tests.titan.jobs import Assets, Job, run_jobs
from tests.titan.small_models import DENSE, LAYERS

LLAMA = LlamaConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=LAYERS,
    num_attention_heads=16,
    rope_theta=500000.0,
    architectures=["LlamaForCausalLM"],
)
KEYS = ["0.999", "0.9999"]
TITAN = ["--titan-model", "llama3", "--titan_flavor", DENSE]


@pytest.fixture(scope="module")
def runs(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs that differ in how the last of their steps is saved."""
    root = tmp_path_factory.mktemp("runs")
    last = ["--checkpoint.last_save_model_only"]
    run_jobs(
        assets,
        2,
        root,
        Job(run=root / "full"),
        Job(run=root / "model-only", options=[*last, "--checkpoint.export_dtype=bfloat16"]),
        Job(run=root / "hf", options=[*last, "--checkpoint.last_save_in_hf"]),
    )
    return root


def read_all(checkpoint: Path) -> dict[str, Tensor]:
    source = open_source(checkpoint)
    return {name: read_tensor(source, name) for name in source.specs}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    LLAMA.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def export(checkpoint: Path, base: Path, *options: str) -> Path:
    output = base.parent / "out"
    places = ["--checkpoint_dir", str(checkpoint), "--output_dir", str(output), "--base_model_path", str(base)]
    assert main(["to-hf", *places, *TITAN, "--quiet", *options]) == 0
    return output


@pytest.mark.parametrize(("kind", "dtype"), [("full", "float32"), ("model-only", "bfloat16")])
def test_it_is_what_torchtitan_writes_as_its_last_save(runs: Path, base: Path, kind: str, dtype: str) -> None:
    found = load_file(export(runs / kind / "checkpoint" / "step-4", base, "--dtype", dtype) / "model.safetensors")
    (file,) = (runs / "hf" / "checkpoint" / "step-4").glob("*.safetensors")
    expected = load_file(file)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value.to(getattr(torch, dtype))) for name, value in expected.items())


def test_from_pretrained_loads_all_of_it(runs: Path, base: Path) -> None:
    output = export(runs / "full" / "checkpoint" / "step-2", base)
    _, report = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(report.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "say which one it is, as in --titan-model"),
        (["--names", "torchtitan"], "which of TorchTitan's models"),
        (["--titan-model", "llama3"], "go together"),
        ([*TITAN, "--names", "transformers"], "exclude each other"),
        (["--titan-model", "qwen3", "--titan_flavor", "debugmodel"], "not the base model"),
        (["--titan-model", "llama3", "--titan_flavor", "8B"], "not the base model"),
    ],
)
def test_without_the_right_model_nothing_is_written(
    runs: Path, base: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, output = runs / "full" / "checkpoint" / "step-4", base.parent / "out"
    places = ["--checkpoint_dir", str(checkpoint), "--output_dir", str(output), "--base_model_path", str(base)]
    assert main(["to-hf", *places, *options]) == 2
    assert words in capsys.readouterr().err
    assert not output.exists()


def test_an_average_that_torchtitan_saved_is_exported(
    runs: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = read_all(runs / "full" / "checkpoint" / "step-4")
    averages = {f"ema.state.{n}.ema_params.{key}": value + float(key) for n, value in weights.items() for key in KEYS}
    checkpoint = save({**weights, **averages}, tmp_path / "step-4")
    places = ["--checkpoint_dir", str(checkpoint), "--base_model_path", str(base), "--dtype", "original"]
    for i, options in enumerate([[], ["--average", KEYS[1]]]):
        output = tmp_path / f"out-{i}"
        assert main(["to-hf", *places, *TITAN, "--output_dir", str(output), *options]) == 0
        assert f"of several averages, {KEYS[i]}" in capsys.readouterr().out
        found = load_file(output / "ema.safetensors")["model.norm.weight"]
        assert torch.equal(found, weights["norm.weight"] + float(KEYS[i]))
