"""Exports of a model that TorchTitan trains with LoRA, which 0.3 has."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from shardsmith.errors import UsageError
from shardsmith.hooks import EMA
from shardsmith.integrations.torchtitan.lora import MergedLora
from tests.titan.checkpoints import tensors_of
from tests.titan.cpu import IS_0_3
from tests.titan.evaluation import FLOAT32, evaluated, losses_of, transformers_loss
from tests.titan.jobs import Assets, Job, error_of, run_jobs
from tests.titan.small_models import DENSE, LAYERS, STAGED, STAGED_LAYERS

pytestmark = pytest.mark.skipif(not IS_0_3, reason="TorchTitan 0.2 has no LoRA")

SUFFIXES = {"main": "", "ema": "-ema"}
HOOKS = {"ema_decay": 0.5, "export_last": True, "export_dtype": "float32"}
STAGES = [
    "--parallelism.pipeline_parallel_degree=2",
    "--parallelism.pipeline_parallel_schedule=Interleaved1F1B",
    "--training.local_batch_size=4",
    "--parallelism.pipeline_parallel_first_stage_less_layers=0",
    "--parallelism.pipeline_parallel_last_stage_less_layers=0",  # TorchTitan trains no stage without an adapter
]
MODULES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj"]


@pytest.fixture(scope="module")
def jobs(assets: Assets, staged_assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Runs on two ranks. Read only."""
    root = tmp_path_factory.mktemp("lora")
    options = [*FLOAT32, "--config=llama3_with_lora", "--optimizer.implementation=foreach", "--debug.seed=1"]
    merged = {**HOOKS, "export_verify": "load"}
    jobs = {
        "merged": Job(run=root / "merged", hooks=merged, options=options, within=partial(evaluated, 4)),
        "adapter": Job(run=root / "adapter", hooks={**HOOKS, "export_lora": "adapter"}, options=options),
    }
    alone = {**HOOKS, "export_lora": "adapter"}
    float8 = ["--config=llama3_with_float8_and_lora", *options[:1], *options[2:]]
    jobs["float8"] = Job(run=root / "float8", hooks=HOOKS, options=float8, within=partial(evaluated, 4))
    wrong = Job(run=root / "none", hooks=alone)
    stages = [*options, "--config=llama3_staged_with_lora", *STAGES]
    staged = {
        "merged stages": Job(run=root / "merged stages", hooks=HOOKS, options=stages),
        "adapter stages": Job(run=root / "adapter stages", hooks=alone, options=stages),
    }
    run_jobs(assets, 2, root, *jobs.values(), wrong)
    run_jobs(staged_assets, 2, root, *staged.values())
    jobs |= staged
    assert {name: error_of(job) for name, job in jobs.items()} == dict.fromkeys(jobs, "")
    return {**jobs, "no adapter": wrong}


def test_what_is_not_exported_is_refused_at_the_start(jobs: dict[str, Job]) -> None:
    assert "no layer of this model has an adapter" in error_of(jobs["no adapter"])


@pytest.mark.parametrize(("model", "suffix"), SUFFIXES.items())
def test_the_merged_model_has_the_loss_of_the_run(jobs: dict[str, Job], model: str, suffix: str) -> None:
    job = jobs["merged"]
    assert transformers_loss(job.run / "hf" / f"step-4{suffix}") == pytest.approx(losses_of(job.run)[model], abs=1e-5)


def test_the_weights_that_train_stay_as_they_are(jobs: dict[str, Job]) -> None:
    """The base is frozen, and merging puts it back bit for bit: it is that of the run that merges nothing."""
    one, other = (tensors_of(jobs[name].run / "checkpoint" / "step-4") for name in ("merged", "adapter"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("ranks", ["", " stages"])
@pytest.mark.parametrize("suffix", SUFFIXES.values())
def test_the_adapter_alone_makes_the_merged_model(jobs: dict[str, Job], suffix: str, ranks: str) -> None:
    """As peft does it: W + alpha / r * B A, with W the frozen weight."""
    flavor, layers = (STAGED, STAGED_LAYERS) if ranks else (DENSE, LAYERS)
    merged = load_file(jobs[f"merged{ranks}"].run / "hf" / f"step-4{suffix}" / "model.safetensors")
    directory = jobs[f"adapter{ranks}"].run / "hf" / f"step-4{suffix}"
    found = load_file(directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 16.0)
    assert len(found) == 2 * len(config["target_modules"]) == 2 * layers * len(MODULES)
    frozen = base_of(jobs[f"adapter{ranks}"].run / "checkpoint" / "step-4", flavor)
    for module in config["target_modules"]:
        assert module.split(".", 3)[-1] in MODULES
        a, b = (found[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        change = config["lora_alpha"] / config["r"] * (b @ a)
        assert change.abs().max() > 0
        assert torch.allclose(frozen[f"{module}.weight"] + change, merged[f"{module}.weight"], atol=1e-6)


@pytest.mark.parametrize("suffix", SUFFIXES.values())
def test_the_merged_model_of_all_stages_is_whole(jobs: dict[str, Job], suffix: str) -> None:
    """``transformers_loss`` wants each tensor of the class, and no other; those without an adapter are as saved."""
    directory = jobs["merged stages"].run / "hf" / f"step-4{suffix}"
    assert transformers_loss(directory) > 0
    found = load_file(directory / "model.safetensors")
    frozen = base_of(jobs["merged stages"].run / "checkpoint" / "step-4", STAGED)
    kept = [name for name in frozen if not any(module in name for module in MODULES)]
    assert len(kept) == len(found) - STAGED_LAYERS * len(MODULES)
    assert all(torch.equal(found[name], frozen[name]) for name in kept)


@pytest.mark.parametrize(("model", "suffix"), SUFFIXES.items())
def test_layers_in_float8_are_merged_in_the_dtype_of_their_weights(
    jobs: dict[str, Job], model: str, suffix: str
) -> None:
    run, module = jobs["float8"].run, "layers.0.attention.wo"
    directory = run / "hf" / f"step-4{suffix}"
    saved = tensors_of(run / "checkpoint" / "step-4", model)
    found = load_file(directory / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"]
    change = 16.0 / 8 * (saved[f"{module}.lora_b.weight"] @ saved[f"{module}.lora_a.weight"])
    assert change.abs().max() > 0
    assert torch.allclose(found, saved[f"{module}.weight"] + change, atol=1e-6)
    assert transformers_loss(directory) == pytest.approx(losses_of(run)[model], abs=0.02)  # float8 rounds


def test_an_average_that_cannot_be_merged_leaves_no_weights_to_the_next_export() -> None:
    from torchtitan.components.lora import _get_lora_cls
    from torchtitan.models.common.linear import Linear

    model = nn.Sequential(_get_lora_cls(Linear).Config(in_features=6, out_features=4, rank=2, alpha=4.0).build())
    for weight in model.parameters():
        nn.init.normal_(weight)
    ema, view = EMA(model, decay=0.5), MergedLora(model)
    with ema.staging(), pytest.raises(UsageError, match="swap the average in"), view.ready(ema):
        pytest.fail("there is nothing to export")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
        with view.ready(ema):
            found = {kind: view.values(kind)["0.weight"] for kind in ("main", "ema")}
            # The layer's own answer to each unit vector is a column of what it multiplies with.
            torch.testing.assert_close(found["main"], model(torch.eye(6)).t())
            with ema.swapped_in():
                torch.testing.assert_close(found["ema"], model(torch.eye(6)).t())


def base_of(step: Path, flavor: str) -> dict[str, Tensor]:
    """The frozen weights of a step, under the names that they have in transformers."""
    from shardsmith.integrations.torchtitan.models import build_titan_model

    weights = {name: value for name, value in tensors_of(step).items() if "lora_" not in name}
    found: dict[str, Tensor] = build_titan_model(f"llama3/{flavor}").adapter.to_hf(weights)
    return found
