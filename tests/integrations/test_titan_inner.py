from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig

from shardsmith.errors import UsageError
from shardsmith.hooks import HFExport, at
from shardsmith.integrations.torchtitan.inner import InnerNames, refuse_replaced

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


class Holder(nn.Module):
    """As TorchTitan's backend holds a model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


@pytest.mark.parametrize(
    "config", [LlamaConfig(**SMALL, tie_word_embeddings=True), MixtralConfig(**SMALL, num_local_experts=3)], ids=type
)
def test_a_held_model_is_exported_as_itself(config: PreTrainedConfig, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    holder = Holder(model)
    export = HFExport(
        tmp_path / "hf",
        model=holder,
        when=at(1),
        dtype="float32",
        base_model=tmp_path / "base",
        names=InnerNames.of(holder),
    )
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    export.export(1)
    export.close()
    found, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf" / "step-1", output_loading_info=True)
    assert not any(report.values())
    expected = model.state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


def test_modules_that_the_trainer_has_put_into_it_are_refused() -> None:
    holder = Holder(AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)))
    refuse_replaced(holder)
    holder.model.model.layers[0].mlp = nn.ModuleDict({"routed_experts": nn.Linear(2, 2)})
    with pytest.raises(UsageError, match=r"LlamaForCausalLM .* model\.layers\.0\.mlp\.routed_experts\.weight for one"):
        refuse_replaced(holder)


def test_other_models_are_not_taken_for_such() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    assert InnerNames.of(model) is None
    assert InnerNames.of(nn.Sequential(nn.Linear(2, 2))) is None
