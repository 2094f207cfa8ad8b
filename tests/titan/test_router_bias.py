"""Exports of experts whose files have no place for what balances them: what that costs, and that nothing else does."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shardsmith.cli import main
from tests.titan import small_models
from tests.titan.cpu import IS_0_3
from tests.titan.evaluation import FLOAT32, _titan_loss, transformers_loss
from tests.titan.hf_models import MODELS, make_model
from tests.titan.jobs import Assets, Job, error_of, log_of, run_jobs

STEPS = 10
CHOICE = (
    [f"--config=qwen3_{small_models.MOE}"] if IS_0_3 else ["--model.name=qwen3", f"--model.flavor={small_models.MOE}"]
)


@contextlib.contextmanager
def balanced() -> Iterator[None]:
    """The optimizers that move the bias, which 0.2 has for DeepSeek and Llama 4, and does not give to Qwen3."""
    if IS_0_3:
        yield
        return
    import torchtitan.components.optimizer as optimizer
    import torchtitan.models.qwen3 as qwen3

    original, qwen3.build_optimizers = qwen3.build_optimizers, optimizer.build_optimizers_with_moe_load_balancing
    try:
        yield
    finally:
        qwen3.build_optimizers = original


def evaluate_both(trainer: Any, run: Path) -> None:
    """The loss of the live model as it is, and without the bias of its routers."""
    (model,) = trainer.model_parts
    biases = [buffer for name, buffer in model.named_buffers() if "expert_bias" in name]
    assert biases
    found: dict[str, Any] = {"with": _titan_loss(model)}
    kept = [bias.clone() for bias in biases]
    with torch.no_grad():
        for bias in biases:
            bias.zero_()
        found["without"] = _titan_loss(model)
        for bias, value in zip(biases, kept, strict=True):
            bias.copy_(value)
    found["largest"] = max(float(value.abs().max()) for value in kept)
    found["values"] = [value.tolist() for value in kept]
    (run / f"both-{trainer.step}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def jobs(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    root = tmp_path_factory.mktemp("routers")
    base, dcp = root / "base", root / "dcp"
    make_model(MODELS[f"qwen3/{small_models.MOE}"](), base)
    for file in assets.hf.glob("tokenizer*"):
        (base / file.name).write_bytes(file.read_bytes())
    names = ["--layout", "torchtitan", "--titan_model", "qwen3", "--titan_flavor", small_models.MOE]
    assert main(["to-dcp", "--model", str(base), "--checkpoint", str(dcp), *names, "--quiet"]) == 0
    hooks = {"export_last": True, "export_dtype": "float32", "export_base_model": str(base)}
    start = [f"--checkpoint.initial_load_path={dcp}", "--debug.seed=1"]  # TorchTitan's new experts do next to nothing
    in_file = {**hooks, "export_router_bias": "file"}
    options = [*CHOICE, *FLOAT32, *start, f"--training.steps={STEPS}", "--checkpoint.interval=100"]
    jobs = {
        "in a file": Job(run=root / "file", hooks=in_file, options=options, observe=evaluate_both, within=balanced),
        "loaded": Job(run=root / "loaded", hooks={**hooks, "export_verify": "load"}, options=options, within=balanced),
        "refused": Job(run=root / "refused", hooks={**hooks, "export_router_bias": "refuse"}, options=options),
    }
    if not IS_0_3:
        jobs["as it comes"] = Job(run=root / "as it comes", hooks=hooks, options=options, observe=evaluate_both)
    run_jobs(assets, 1, root, *jobs.values())
    return jobs


def test_it_is_said_at_the_start_what_an_export_cannot_hold(jobs: dict[str, Job]) -> None:
    said = log_of(jobs["in a file"])
    assert "expert_bias" in said
    assert "as soon as they are not zero, an export sends some tokens to other experts than the run does" in said
    assert said.index("an export sends some tokens") < said.index("Training starts")


def test_a_run_whose_exports_would_be_another_model_is_refused_where_that_is_asked_for(jobs: dict[str, Job]) -> None:
    assert "choose experts in training" in error_of(jobs["refused"])
    assert "loss:" not in log_of(jobs["refused"])


def losses(job: Job) -> tuple[dict[str, Any], float]:
    """What ``evaluate_both`` found, and the loss of the export."""
    assert error_of(job) == ""
    return json.loads((job.run / f"both-{STEPS}.json").read_text()), transformers_loss(job.run / "hf" / f"step-{STEPS}")


def test_the_bias_is_all_that_an_export_lacks(jobs: dict[str, Job]) -> None:
    live, exported = losses(jobs["in a file"])
    assert live["largest"] > small_models.BALANCE
    assert live["without"] == pytest.approx(exported, abs=1e-4)
    assert abs(live["with"] - exported) > 2e-4


def test_a_file_beside_the_weights_has_them(jobs: dict[str, Job]) -> None:
    live, _ = losses(jobs["in a file"])
    found = json.loads((jobs["in a file"].run / "hf" / f"step-{STEPS}" / "router_bias.json").read_text())
    assert list(found.values()) == live["values"]
    assert all("expert_bias" in name for name in found)


def test_an_export_that_answers_otherwise_than_the_run_is_refused_where_it_is_loaded(jobs: dict[str, Job]) -> None:
    assert "loaded, its answers differ from the live model's" in error_of(jobs["loaded"])
    assert not (jobs["loaded"].run / "hf" / f"step-{STEPS}").exists()


@pytest.mark.skipif(IS_0_3, reason="0.3 gives Qwen3 the optimizers that move its bias")
def test_0_2_does_not_move_the_bias_of_qwen3_so_its_export_is_the_model_that_trains(jobs: dict[str, Job]) -> None:
    live, exported = losses(jobs["as it comes"])
    assert live["largest"] == 0
    assert live["with"] == pytest.approx(exported, abs=1e-4)
