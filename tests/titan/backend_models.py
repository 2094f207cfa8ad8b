"""A model of transformers for TorchTitan's backend of such models, and how a job names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from tests.titan.cpu import IS_0_3
from tests.titan.hf_models import make_model

NAME = "transformers_modeling_backend"
CONFIG: dict[str, Any] = {  # 0.2 knows no other sizes than those of its debugmodel
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def make(directory: Path) -> None:
    """Write its directory."""
    make_model(LlamaConfig(**CONFIG, tie_word_embeddings=False), directory)


def choice(directory: Path) -> list[str]:
    """How a user asks for the backend."""
    if IS_0_3:
        return ["--config=transformers_backend", f"--hf_model={directory}"]
    module = f"torchtitan.experiments.{NAME}.job_config"
    model = [f"--model.name={NAME}", "--model.flavor=debugmodel", f"--hf_transformers.model={directory}"]
    return [*model, f"--job.custom_config_module={module}"]
