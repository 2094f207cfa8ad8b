"""The tests' models of TorchTitan as transformers has them, and random directories of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from shardsmith.integrations.torchtitan.models import build_titan_model
from tests.titan import small_models
from tests.titan.cpu import IS_0_3
from tests.titan.jobs import LLAMA

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
DEEPSEEK = DeepseekV3Config(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=1024,
    moe_intermediate_size=256,
    num_hidden_layers=small_models.LAYERS,
    num_attention_heads=16,
    num_key_value_heads=16,
    n_shared_experts=2,
    n_routed_experts=8,
    routed_scaling_factor=small_models.SCALE,
    kv_lora_rank=512,
    q_lora_rank=None,
    qk_rope_head_dim=64,
    v_head_dim=128,
    qk_nope_head_dim=128,
    n_group=1,
    topk_group=1,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    norm_topk_prob=True,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    max_position_embeddings=16384,
    rope_interleave=True,
    rope_parameters={
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.7,
        "original_max_position_embeddings": 4096,
    },
)


def _without_yarn(config: DeepseekV3Config) -> DeepseekV3Config:
    """As 0.2 computes it where sequences are short."""
    changed = copy.deepcopy(config)
    changed.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    return changed


MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    f"llama3/{small_models.DENSE}": lambda: LLAMA,
    f"qwen3/{small_models.DENSE}": lambda: Qwen3Config(**QWEN, tie_word_embeddings=False),
    f"qwen3/{small_models.TIED_DENSE}": lambda: Qwen3Config(**QWEN, tie_word_embeddings=True),
    f"deepseek_v3/{small_models.DENSE}": lambda: DEEPSEEK if IS_0_3 else _without_yarn(DEEPSEEK),
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

PREDICTS = f"model.layers.{small_models.LAYERS}."
"""How the layer that predicts the second next token is called: behind the others, as in the files of DeepSeek-V3."""


def make_with_mtp(directory: Path) -> None:
    """DeepSeek-V3 with such a layer, which transformers leaves out. 0.3."""
    titan = build_titan_model("tests.titan.configs/deepseek_v3_small_mtp")
    torch.manual_seed(0)
    values = {name: torch.randn(tensor.shape) * 0.02 for name, tensor in titan.model.state_dict().items()}
    config = DEEPSEEK.to_dict() | {"num_nextn_predict_layers": 1, "architectures": ["DeepseekV3ForCausalLM"]}
    DeepseekV3Config(**config).save_pretrained(directory)
    tensors = {name: value.clone() for name, value in titan.adapter.to_hf(values).items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


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
