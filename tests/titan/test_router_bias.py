"""Exports of experts whose files have no place for what balances them: what that costs, and that nothing else does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig

from tests.titan import small_models
from tests.titan.cpu import IS_0_3
from tests.titan.evaluation import FLOAT32, _titan_loss, transformers_loss
from tests.titan.jobs import Assets, Job, error_of, log_of, run_jobs
from tests.titan.test_start_loss import QWEN

STEPS = 20
CHOICE = (
    [f"--config=qwen3_{small_models.MOE}"] if IS_0_3 else ["--model.name=qwen3", f"--model.flavor={small_models.MOE}"]
)


def evaluate_both(trainer: Any, run: Path) -> None:
    """The loss of the live model as it is, and without the bias of its routers."""
    (model,) = trainer.model_parts
    biases = [buffer for name, buffer in model.named_buffers() if "expert_bias" in name]
    assert biases
    found = {"with": _titan_loss(model)}
    kept = [bias.clone() for bias in biases]
    with torch.no_grad():
        for bias in biases:
            bias.zero_()
        found["without"] = _titan_loss(model)
        for bias, value in zip(biases, kept, strict=True):
            bias.copy_(value)
    found["largest"] = max(float(value.abs().max()) for value in kept)
    (run / f"both-{trainer.step}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def jobs(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    root = tmp_path_factory.mktemp("routers")
    base = root / "base"
    Qwen3MoeConfig(
        **QWEN,
        tie_word_embeddings=False,
        num_experts=small_models.EXPERTS,
        num_experts_per_tok=small_models.CHOSEN,
        moe_intermediate_size=small_models.WIDTH,
        norm_topk_prob=True,
        architectures=["Qwen3MoeForCausalLM"],
    ).save_pretrained(base)
    for file in assets.hf.glob("tokenizer*"):
        (base / file.name).write_bytes(file.read_bytes())
    hooks = {"export_last": True, "export_dtype": "float32", "export_base_model": str(base)}
    options = [*CHOICE, *FLOAT32, f"--training.steps={STEPS}", "--checkpoint.interval=100", "--metrics.log_freq=10"]
    jobs = {
        "left out": Job(run=root / "left", hooks=hooks, options=options, observe=evaluate_both),
        "refused": Job(run=root / "refused", hooks={**hooks, "export_router_bias": "refuse"}, options=options),
    }
    run_jobs(assets, 1, root, *jobs.values())
    return jobs


def test_it_is_said_at_the_start_what_an_export_cannot_hold(jobs: dict[str, Job]) -> None:
    said = log_of(jobs["left out"])
    assert "expert_bias" in said
    assert "an export sends some tokens to other experts than the run does" in said
    assert said.index("an export sends some tokens") < said.index("Training starts")


def test_a_run_whose_exports_would_be_another_model_is_refused_where_that_is_asked_for(jobs: dict[str, Job]) -> None:
    assert "choose experts in training" in error_of(jobs["refused"])
    assert "loss:" not in log_of(jobs["refused"])


def test_the_bias_is_all_that_an_export_lacks(jobs: dict[str, Job]) -> None:
    job = jobs["left out"]
    assert error_of(job) == ""
    (path,) = job.run.glob("both-*.json")
    found = json.loads(path.read_text())
    exported = transformers_loss(job.run / "hf" / f"step-{STEPS}")
    assert found["largest"] > 0.005
    assert found["without"] == pytest.approx(exported, abs=2e-5)
    assert abs(found["with"] - exported) > 1e-4
