"""No false alarm for the architectures that people train: ties, buffers, fused experts and renamings are explained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shardsmith.diagnose import Questions, diagnose
from tests.dcp_directories import save_sharded

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
SMALL_GPT = {"n_embd": 64, "n_head": 4, "n_layer": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma": {"head_dim": 16},  # tied, which its config need not say
    "gemma3_text": {"head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 16},
    "mistral": {},
    "mixtral": {"num_local_experts": 4},
    "olmo": {},
    "olmoe": EXPERTS,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 48},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "phi3": {},
    "gpt_neox": {},  # its head has another name in files
    "gpt2": SMALL_GPT,
    "gptj": SMALL_GPT | {"rotary_dim": 8},
    "falcon": {},
    "opt": {"word_embed_proj_dim": 64, "ffn_dim": 96},
    "bloom": {},
    "mamba": {},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_of_any_architecture_is_found_to_be_itself(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **SIZES | ARCHITECTURES[architecture]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "base")
    checkpoint = save_sharded(dict(model.state_dict()), tmp_path / "checkpoint", 3, nested="model")
    found = diagnose(checkpoint, tmp_path / "base", Questions())
    assert (found.faults, found.unseen) == ((), ())
    facts = found.levels[1].facts["main"]
    assert facts["equal"] == facts["tensors compared"] > 10
