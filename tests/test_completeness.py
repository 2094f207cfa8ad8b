"""What torch's get_model_state_dict gives is the measure of a checkpoint, for models of many kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from shardsmith.cli import main
from shardsmith.formats.dcp.index import read_index
from shardsmith.hf.blueprint import describe, without_weights
from shardsmith.load.load import load_initial

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 16},
    "Qwen3Moe": {"num_experts": 4, "head_dim": 16, **EXPERTS},
    "Mixtral": {"num_local_experts": 4},
    "Olmo2": {},
    "Gemma2": {"head_dim": 16},
    "Phi3": {},
    "Granite": {},
    "StableLm": {},
    "Starcoder2": {},
    "Cohere": {},
    "GPTNeoX": {"num_key_value_heads": None},
    "DeepseekV3": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        **EXPERTS,
    },
}


def config_of(kind: str) -> Any:
    settings = {name: value for name, value in {**SIZES, **MODELS[kind]}.items() if value is not None}
    return getattr(transformers, f"{kind}Config")(**settings, architectures=[f"{kind}ForCausalLM"])


@pytest.mark.parametrize("kind", MODELS)
def test_a_converted_checkpoint_has_exactly_the_keys_of_get_model_state_dict(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config_of(kind))
    model.save_pretrained(tmp_path / "hf")
    assert main(["to-dcp", "--model", str(tmp_path / "hf"), "--checkpoint", str(tmp_path / "dcp"), "--quiet"]) == 0
    wanted = get_model_state_dict(model)
    index = read_index(tmp_path / "dcp")
    assert index.tensors.keys() == wanted.keys()
    assert all(index.tensors[name].spec.shape == tuple(value.shape) for name, value in wanted.items())
    assert all(index.tensors[name].spec.dtype == value.dtype for name, value in wanted.items())
    other = getattr(transformers, f"{kind}ForCausalLM")(config_of(kind))
    report = load_initial(tmp_path / "dcp", model=other)
    assert report.tensors == len(wanted)
    assert all(torch.equal(value, wanted[name]) for name, value in get_model_state_dict(other).items())


def test_the_measure_is_taken_without_weights() -> None:
    with without_weights():
        model = transformers.LlamaForCausalLM(config_of("Llama"))
    assert describe(model).state_dict.keys() == get_model_state_dict(model).keys()
