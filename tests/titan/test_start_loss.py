"""From a Hugging Face directory through to-dcp into TorchTitan: the loss at the start is that of the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    Llama4TextConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from shardsmith.cli import main
from tests.titan import small_models
from tests.titan.cpu import IS_0_3
from tests.titan.evaluation import FLOAT32, evaluated, losses_of, transformers_loss
from tests.titan.jobs import LLAMA, Assets, Job, error_of, log_of, run_jobs

QWEN: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "head_dim": 128,
    "intermediate_size": 3072,
    "num_hidden_layers": small_models.LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "rms_norm_eps": 1e-6,
}
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama3/debugmodel": lambda: LLAMA,
    f"qwen3/{small_models.DENSE}": lambda: Qwen3Config(**QWEN, tie_word_embeddings=small_models.TIED),
    f"qwen3/{small_models.MOE}": lambda: Qwen3MoeConfig(
        **QWEN,
        tie_word_embeddings=False,
        num_experts=small_models.EXPERTS,
        num_experts_per_tok=small_models.CHOSEN,
        moe_intermediate_size=small_models.WIDTH,
        norm_topk_prob=True,
    ),
    f"gpt_oss/{small_models.DENSE}": lambda: GptOssConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=small_models.WIDTH,
        num_hidden_layers=small_models.LAYERS,
        num_local_experts=8,
        num_experts_per_tok=4,
        rms_norm_eps=1e-5,
        eos_token_id=1,
        pad_token_id=None,
        experts_implementation="eager",
    ),
}
if not IS_0_3:
    MODELS[f"llama4/{small_models.DENSE}"] = lambda: Llama4TextConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        intermediate_size_mlp=768,
        num_hidden_layers=small_models.LAYERS,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        use_qk_norm=False,
        attn_temperature_tuning=False,
        no_rope_layers=[1] * small_models.LAYERS,
        layer_types=["full_attention"] * small_models.LAYERS,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=None,
    )

TOLERANCES = {f"gpt_oss/{small_models.DENSE}": 0.02}
"""Where TorchTitan computes in bfloat16 whatever it is told: 0.2 the layers, 0.3 the experts."""


def make_model(config: PreTrainedConfig, directory: Path) -> None:
    """Random, but no weight is what a trainer would start with."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(directory)


@pytest.fixture(scope="module")
def started(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Job]]:
    """For each model its directory, and a job of TorchTitan's that has started from it and exports after a step."""
    root = tmp_path_factory.mktemp("models")
    jobs: dict[str, tuple[Path, Job]] = {}
    for title, config in MODELS.items():
        name, flavor = title.split("/")
        hf, dcp, run = (root / part / flavor / name for part in ("hf", "dcp", "run"))
        make_model(config(), hf)
        for file in assets.hf.glob("tokenizer*"):
            (hf / file.name).write_bytes(file.read_bytes())
        names = ["--layout", "torchtitan", "--titan_model", name, "--titan_flavor", flavor]
        assert main(["to-dcp", "--model", str(hf), "--checkpoint", str(dcp), *names, "--quiet"]) == 0
        precision = [] if IS_0_3 and title in TOLERANCES else FLOAT32  # 0.3 cannot compute these experts in it
        choice = [f"--config={name}_{flavor}"] if IS_0_3 else [f"--model.name={name}", f"--model.flavor={flavor}"]
        jobs[title] = (
            hf,
            Job(
                run=run,
                options=[*choice, *precision, "--training.steps=1", f"--checkpoint.initial_load_path={dcp}"],
                hooks={"ema_decay": 0.5, "export_last": True, "export_dtype": "float32", "export_base_model": str(hf)},
                within=partial(evaluated, 0),
            ),
        )
    run_jobs(assets, 2, root, *(job for _, job in jobs.values()))
    return jobs


@pytest.mark.parametrize("title", MODELS)
def test_torchtitan_starts_with_the_loss_of_the_model(started: dict[str, tuple[Path, Job]], title: str) -> None:
    hf, job = started[title]
    assert error_of(job) == ""
    assert "elements) equal those of" in log_of(job)
    assert losses_of(job.run)["main"] == pytest.approx(transformers_loss(hf), abs=TOLERANCES.get(title, 1e-4))


@pytest.mark.parametrize("title", MODELS)
def test_it_comes_out_again_as_a_model_that_transformers_loads(
    started: dict[str, tuple[Path, Job]], title: str
) -> None:
    hf, job = started[title]
    main_loss, average = (transformers_loss(job.run / "hf" / f"step-1{suffix}") for suffix in ("", "-ema"))
    assert main_loss != pytest.approx(transformers_loss(hf), abs=1e-4)  # it has learned something
    assert average != main_loss
    assert json.loads((job.run / "hf" / "step-1" / "config.json").read_text())["vocab_size"] == 2048
