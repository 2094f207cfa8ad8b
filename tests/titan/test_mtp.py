"""DeepSeek-V3 of 0.3 with a layer that predicts the second next token: into Hugging Face files and back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shardsmith.cli import main
from tests.titan.checkpoints import digests_of
from tests.titan.cpu import IS_0_3
from tests.titan.evaluation import FLOAT32
from tests.titan.hf_models import PREDICTS, make_with_mtp
from tests.titan.jobs import Assets, Job, error_of, run_jobs

pytestmark = pytest.mark.skipif(not IS_0_3, reason="TorchTitan 0.2 has no such layers")

TITAN = ["--titan-model", "tests.titan.configs", "--titan-flavor", "deepseek_v3_small_mtp", "--quiet"]


@pytest.fixture(scope="module")
def base(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with random weights of all layers. Read only."""
    hf = tmp_path_factory.mktemp("mtp") / "hf"
    make_with_mtp(hf)
    for file in assets.hf.glob("tokenizer*"):
        shutil.copy(file, hf)
    return hf


@pytest.fixture(scope="module")
def jobs(assets: Assets, base: Path) -> dict[str, Job]:
    root = base.parent
    assert (
        main(["to-dcp", "--base-model", str(base), "--output-dir", str(root / "dcp"), "--layout", "torchtitan", *TITAN])
        == 0
    )
    start = f"--checkpoint.initial_load_path={root / 'dcp'}"
    options = ["--config=deepseek_v3_small_mtp", *FLOAT32, "--training.steps=2", "--checkpoint.interval=1", start]
    hooks = {"ema_decay": 0.5, "export_last": True, "export_dtype": "float32", "export_base_model": str(base)}
    last = ["--checkpoint.last_save_model_only", "--checkpoint.last_save_in_hf"]
    one_write = {"ema_decay": 0.5, "engine": True, "weights": "huggingface", "export_base_model": str(base)}
    jobs = {
        "whole": Job(run=root / "whole", hooks=hooks, options=options),
        "theirs": Job(run=root / "theirs", options=[*options, *last]),
        "one write": Job(run=root / "one write", hooks=one_write, options=options),
    }
    run_jobs(assets, 2, root, *jobs.values())
    assert {name: error_of(job) for name, job in jobs.items()} == dict.fromkeys(jobs, "")
    return jobs


def test_an_export_is_what_torchtitan_writes_as_its_last_save(jobs: dict[str, Job]) -> None:
    found = load_file(jobs["whole"].run / "hf" / "step-2" / "model.safetensors")
    (file,) = (jobs["theirs"].run / "checkpoint" / "step-2").glob("*.safetensors")
    expected = load_file(file)
    assert any(name.startswith(PREDICTS) for name in expected)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def assert_export(output: Path, run: Path) -> None:
    """What to-hf has written is, of both models, what the run has exported."""
    for suffix, file in (("", "model.safetensors"), ("-ema", "ema.safetensors")):
        found = load_file(output / file)
        expected = load_file(run / "hf" / f"step-2{suffix}" / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_step_is_compared_by_the_names_that_it_records(jobs: dict[str, Job], base: Path) -> None:
    """Nobody says what model it is: verify and diagnose find it in the step's metadata.json."""
    step, export = jobs["whole"].run / "checkpoint" / "step-2", jobs["whole"].run / "hf" / "step-2"
    assert main(["verify", str(step), str(export), "--models", "main"]) == 0
    assert main(["verify", str(step), str(base), "--models", "main"]) == 1
    assert main(["diagnose", "--checkpoint", str(step), "--base-model", str(export), "--level", "values"]) == 0


def test_a_step_of_one_write_is_converted_by_the_names_that_it_records(jobs: dict[str, Job], tmp_path: Path) -> None:
    step = jobs["one write"].run / "checkpoint" / "step-2"
    assert digests_of(step) == digests_of(jobs["whole"].run / "checkpoint" / "step-2")
    places = ["--checkpoint", str(step), "--output-dir", str(tmp_path / "out"), "--base-model", str(step)]
    assert main(["to-hf", *places, "--dtype", "float32", "--quiet"]) == 0
    assert_export(tmp_path / "out", jobs["whole"].run)
