"""A model inside of a module inside of a checkpoint's dict: what its base does not list is found there, too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dcp_directories import save
from tests.families.tiny import all_families, make_tiny
from tests.hf.test_directory_check import assert_loads, to_hf

FAMILIES = {family.kind: family for family in all_families()}
KINDS = ("JetMoeForCausalLM", "MarianMTModel", "BartForConditionalGeneration")
"""With a tied head, with positions that the class computes, and with both kinds of names for one tensor."""


@pytest.mark.parametrize("prefix", ["model.", "model.module.", "net._orig_mod.", "policy.actor."])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_base_does_not_list_is_found_in_a_module_in_a_dict(kind: str, prefix: str, tmp_path: Path) -> None:
    model = make_tiny(FAMILIES[kind])
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    state = dict(model.state_dict())
    save({"state_dict": {prefix + name: value for name, value in state.items()}, "epoch": 1}, tmp_path / "ck")
    to_hf(tmp_path / "ck", tmp_path / "base", tmp_path / "out")
    assert_loads(tmp_path / "out", state, type(model))
