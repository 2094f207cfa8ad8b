"""DeepSeek-V3 of 0.3 with a layer that predicts the second next token: into Hugging Face files and back."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shardsmith.cli import main
from shardsmith.integrations.torchtitan.models import build_titan_model
from tests.titan.checkpoints import digests_of, tensors_of
from tests.titan.cpu import IS_0_3
from tests.titan.evaluation import FLOAT32, TOKENS, _loss, evaluated, losses_of
from tests.titan.hf_models import DEEPSEEK
from tests.titan.jobs import Assets, Job, error_of, log_of, run_jobs
from tests.titan.small_models import LAYERS

pytestmark = pytest.mark.skipif(not IS_0_3, reason="TorchTitan 0.2 has no such layers")

TITAN = ["--titan-model", "tests.titan.configs", "--titan-flavor", "deepseek_v3_small_mtp", "--quiet"]
OF_LAYER = f"model.layers.{LAYERS}."
"""Of the layer that predicts: behind the others, as in the files of DeepSeek-V3."""


def main_loss(directory: Path) -> float:
    """Of transformers, which leaves such a layer out: nothing else may be left over, and nothing missing."""
    model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert all(name.startswith(OF_LAYER) for name in report["unexpected_keys"])
    assert not report["missing_keys"]
    with torch.no_grad():
        return _loss(model(TOKENS[:, :-1]).logits)


@pytest.fixture(scope="module")
def base(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with random weights of all layers. Read only."""
    hf = tmp_path_factory.mktemp("mtp") / "hf"
    titan = build_titan_model("tests.titan.configs/deepseek_v3_small_mtp")
    torch.manual_seed(0)
    values = {name: torch.randn(tensor.shape) * 0.02 for name, tensor in titan.model.state_dict().items()}
    config = DEEPSEEK.to_dict() | {"num_nextn_predict_layers": 1, "architectures": ["DeepseekV3ForCausalLM"]}
    type(DEEPSEEK)(**config).save_pretrained(hf)
    save_file(
        {n: v.clone() for n, v in titan.adapter.to_hf(values).items()}, hf / "model.safetensors", {"format": "pt"}
    )
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
    options = ["--config=deepseek_v3_small_mtp", *FLOAT32, "--training.steps=2", "--checkpoint.interval=1"]
    start, in_hf = f"--checkpoint.initial_load_path={root / 'dcp'}", "--checkpoint.initial_load_in_hf"
    hooks = {"ema_decay": 0.5, "export_last": True, "export_dtype": "float32", "export_base_model": str(base)}
    last = ["--checkpoint.last_save_model_only", "--checkpoint.last_save_in_hf"]
    jobs = {
        "whole": Job(run=root / "whole", hooks=hooks, options=[*options, start], within=partial(evaluated, 0)),
        "files": Job(
            run=root / "files",
            hooks={"ema_decay": 0.5},
            options=[*options, f"--checkpoint.initial_load_path={base}", in_hf],
            within=partial(evaluated, 0),
        ),
        "theirs": Job(run=root / "theirs", options=[*options, start, *last]),
    }
    one_write = {"ema_decay": 0.5, "engine": True, "weights": "huggingface", "export_base_model": str(base)}
    jobs["one write"] = Job(run=root / "one write", hooks=one_write, options=[*options, start])
    run_jobs(assets, 2, root, *jobs.values())
    resumed = Job(run=root / "resumed", hooks={"ema_decay": 0.5}, options=options)
    shutil.copytree(root / "whole" / "checkpoint" / "step-1", root / "resumed" / "checkpoint" / "step-1")
    run_jobs(assets, 2, root, resumed)
    jobs["resumed"] = resumed
    assert {name: error_of(job) for name, job in jobs.items()} == dict.fromkeys(jobs, "")
    return jobs


@pytest.mark.parametrize("name", ["whole", "files"])
def test_it_starts_with_the_loss_of_the_model(jobs: dict[str, Job], base: Path, name: str) -> None:
    assert "elements) equal those of" in log_of(jobs[name])
    assert losses_of(jobs[name].run)["main"] == pytest.approx(main_loss(base), abs=1e-4)


def test_an_export_is_what_torchtitan_writes_as_its_last_save(jobs: dict[str, Job]) -> None:
    found = load_file(jobs["whole"].run / "hf" / "step-2" / "model.safetensors")
    (file,) = (jobs["theirs"].run / "checkpoint" / "step-2").glob("*.safetensors")
    expected = load_file(file)
    assert any(name.startswith(OF_LAYER) for name in expected)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def assert_export(output: Path, run: Path) -> None:
    """What to-hf has written is, of both models, what the run has exported."""
    for suffix, file in (("", "model.safetensors"), ("-ema", "ema.safetensors")):
        found = load_file(output / file)
        expected = load_file(run / "hf" / f"step-2{suffix}" / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_step_is_converted_by_the_function_of_its_registry(jobs: dict[str, Job], base: Path, tmp_path: Path) -> None:
    places = ["--checkpoint", str(jobs["whole"].run / "checkpoint" / "step-2"), "--output-dir", str(tmp_path / "out")]
    assert main(["to-hf", *places, "--base-model", str(base), "--dtype", "float32", *TITAN]) == 0
    assert_export(tmp_path / "out", jobs["whole"].run)


def test_a_step_is_converted_and_compared_by_the_names_that_it_records(
    jobs: dict[str, Job], base: Path, tmp_path: Path
) -> None:
    """Nobody says what model it is: to-hf, verify and diagnose find it in the step's metadata.json."""
    step, export = jobs["whole"].run / "checkpoint" / "step-2", jobs["whole"].run / "hf" / "step-2"
    places = ["--checkpoint", str(step), "--output-dir", str(tmp_path / "out")]
    assert main(["to-hf", *places, "--base-model", str(base), "--dtype", "float32", "--quiet"]) == 0
    assert_export(tmp_path / "out", jobs["whole"].run)
    assert main(["verify", str(step), str(export), "--models", "main"]) == 0
    assert main(["verify", str(step), str(base), "--models", "main"]) == 1
    assert main(["diagnose", "--checkpoint", str(step), "--base-model", str(export), "--level", "values"]) == 0


def test_a_step_of_one_write_is_converted_by_the_names_that_it_records(jobs: dict[str, Job], tmp_path: Path) -> None:
    step = jobs["one write"].run / "checkpoint" / "step-2"
    assert digests_of(step) == digests_of(jobs["whole"].run / "checkpoint" / "step-2")
    places = ["--checkpoint", str(step), "--output-dir", str(tmp_path / "out"), "--base-model", str(step)]
    assert main(["to-hf", *places, "--dtype", "float32", "--quiet"]) == 0
    assert_export(tmp_path / "out", jobs["whole"].run)


def test_a_resumed_run_goes_on_as_the_uninterrupted_one(jobs: dict[str, Job]) -> None:
    steps = [jobs[name].run / "checkpoint" / "step-2" for name in ("whole", "resumed")]
    assert digests_of(steps[0]) == digests_of(steps[1])
    assert any(name.startswith("mtp_layers.0.") for name in tensors_of(steps[0], "ema"))
