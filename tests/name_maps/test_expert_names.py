"""What transformers fuses or takes apart in memory comes out as ``save_pretrained`` has it in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    MixtralConfig,
    NomicBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from shardsmith.cli import main
from shardsmith.hooks import HFExport, ShardedSave, every

COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "mixtral": MixtralConfig(**COMMON, intermediate_size=48, num_key_value_heads=2, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(
        **COMMON, moe_intermediate_size=24, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, head_dim=8
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_fused_experts_are_written_one_by_one(tmp_path: Path, config: PreTrainedConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    expected = assert_exported_as_saved(model, tmp_path)
    assert len(expected) > len(model.state_dict())


def test_projections_that_are_one_tensor_in_files_are_joined(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModel.from_config(NomicBertConfig(**COMMON, intermediate_size=48, max_position_embeddings=16))
    expected = assert_exported_as_saved(model, tmp_path)
    assert len(expected) < len(model.state_dict())


def assert_exported_as_saved(model: PreTrainedModel, tmp_path: Path) -> dict[str, Tensor]:
    """Live, and from a checkpoint; what the files hold."""
    model.save_pretrained(tmp_path / "base")
    expected = load_file(tmp_path / "base" / "model.safetensors")
    export = HFExport(tmp_path / "hf", model=model, when=every(1), dtype="float32")
    export.export(1)
    export.close()
    assert_same(load_file(tmp_path / "hf" / "step-1" / "model.safetensors"), expected)

    save = ShardedSave(tmp_path / "checkpoints", model=model, when=every(1))
    save.save(1)
    save.close()
    arguments = {"checkpoint_dir": tmp_path / "checkpoints" / "step-1", "base_model_path": tmp_path / "base"}
    options = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    assert main(["to-hf", *options, "--output_dir", str(tmp_path / "out"), "--dtype", "float32", "--quiet"]) == 0
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), expected)
    return expected


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
