"""Exports of a model that TorchTitan trains with LoRA, which 0.3 has."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shardsmith.cli import main
from tests.titan.checkpoints import tensors_of
from tests.titan.cpu import IS_0_3
from tests.titan.evaluation import FLOAT32, evaluated, losses_of, transformers_loss
from tests.titan.jobs import Assets, Job, error_of, run_jobs

pytestmark = pytest.mark.skipif(not IS_0_3, reason="TorchTitan 0.2 has no LoRA")

SUFFIXES = {"main": "", "ema": "-ema"}
HOOKS = {"ema_decay": 0.5, "export_last": True, "export_dtype": "float32"}
STAGES = ["--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_schedule=1F1B"]
MODULES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj"]


@pytest.fixture(scope="module")
def jobs(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Runs on two ranks. Read only."""
    root = tmp_path_factory.mktemp("lora")
    options = [*FLOAT32, "--config=llama3_with_lora", "--optimizer.implementation=foreach", "--debug.seed=1"]
    merged = {**HOOKS, "export_verify": "load"}
    jobs = {
        "merged": Job(run=root / "merged", hooks=merged, options=options, within=partial(evaluated, 4)),
        "adapter": Job(run=root / "adapter", hooks={**HOOKS, "export_lora": "adapter"}, options=options),
    }
    jobs |= {
        "no adapter": Job(run=root / "none", hooks={**HOOKS, "export_lora": "adapter"}),
        "stages": Job(run=root / "stages", hooks=HOOKS, options=[*options, *STAGES]),
    }
    run_jobs(assets, 2, root, *jobs.values())
    assert [error_of(jobs[name]) for name in ("merged", "adapter")] == ["", ""]
    return jobs


def test_what_is_not_exported_is_refused_at_the_start(jobs: dict[str, Job]) -> None:
    assert "no layer of this model has an adapter" in error_of(jobs["no adapter"])
    assert "not exported from stages of a pipeline" in error_of(jobs["stages"])


@pytest.mark.parametrize(("model", "suffix"), SUFFIXES.items())
def test_the_merged_model_has_the_loss_of_the_run(jobs: dict[str, Job], model: str, suffix: str) -> None:
    job = jobs["merged"]
    assert transformers_loss(job.run / "hf" / f"step-4{suffix}") == pytest.approx(losses_of(job.run)[model], abs=1e-5)


def test_the_weights_that_train_stay_as_they_are(jobs: dict[str, Job]) -> None:
    """The base is frozen, and merging puts it back bit for bit: it is that of the run that merges nothing."""
    one, other = (tensors_of(jobs[name].run / "checkpoint" / "step-4") for name in ("merged", "adapter"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("suffix", SUFFIXES.values())
def test_the_adapter_alone_makes_the_merged_model(jobs: dict[str, Job], suffix: str) -> None:
    """As peft does it: W + alpha / r * B A, with W the frozen weight."""
    merged = load_file(jobs["merged"].run / "hf" / f"step-4{suffix}" / "model.safetensors")
    directory = jobs["adapter"].run / "hf" / f"step-4{suffix}"
    found = load_file(directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 16.0)
    assert len(found) == 2 * len(config["target_modules"]) == 2 * 6 * len(MODULES)
    frozen = base_of(jobs["adapter"].run / "checkpoint" / "step-4")
    for module in config["target_modules"]:
        assert module.split(".", 3)[-1] in MODULES
        a, b = (found[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        change = config["lora_alpha"] / config["r"] * (b @ a)
        assert change.abs().max() > 0
        assert torch.allclose(frozen[f"{module}.weight"] + change, merged[f"{module}.weight"], atol=1e-6)


def base_of(step: Path) -> dict[str, Tensor]:
    """The frozen weights of a step, under the names that they have in transformers."""
    from shardsmith.integrations.torchtitan.models import build_titan_model

    weights = {name: value for name, value in tensors_of(step).items() if "lora_" not in name}
    found: dict[str, Tensor] = build_titan_model("llama3/debugmodel").adapter.to_hf(weights)
    return found


def test_a_step_with_an_adapter_is_refused_by_to_hf_with_what_to_do(
    jobs: dict[str, Job], assets: Assets, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = str(jobs["merged"].run / "checkpoint" / "step-4")
    names = ["--titan-model", "llama3", "--titan-flavor", "debugmodel", "--base-model", str(assets.hf)]
    assert main(["to-hf", "--checkpoint", step, "--output-dir", str(tmp_path / "out"), *names, "--quiet"]) == 2
    assert "Export from the run itself" in capsys.readouterr().err
