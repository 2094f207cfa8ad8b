"""An initial load of a model that Fabric's wrapper holds, which has it under two names."""

from __future__ import annotations

from pathlib import Path

import lightning
import pytest
import torch

from shardsmith.load.load import load_initial
from tests.families.tiny import all_families, make_tiny

FAMILIES = {family.kind: family for family in all_families()}


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "GPT2LMHeadModel"])  # buffers that are not saved, and ties
def test_a_model_in_fabric_is_loaded_and_verified_like_the_model(kind: str, tmp_path: Path) -> None:
    model = make_tiny(FAMILIES[kind])
    model.save_pretrained(tmp_path / "base")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.fill_(7)
    held = lightning.Fabric(accelerator="cpu", devices=1).setup_module(model)
    report = load_initial(tmp_path / "base", model=held, config=tmp_path / "base")
    assert report.loaded
    assert (report.missing, report.extra, report.unproved) == ((), (), ())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
