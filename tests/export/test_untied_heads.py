"""A head that training has untied: config.json says so at every depth, as the library's own save does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.families.tiny import all_families, make_tiny
from tests.hf.test_directory_check import export_live, saved, to_hf

FAMILIES = {family.kind: family for family in all_families()}
KINDS = (  # whose files have other names than the model in memory, and flags at two depths; and one without either
    *("HunYuanVLForConditionalGeneration", "Kimi_K25ForConditionalGeneration", "PaliGemmaForConditionalGeneration"),
    *("GraniteSpeechPlusForConditionalGeneration", "Gemma3ForConditionalGeneration", "GemmaForCausalLM"),
)


def flags(directory: Path) -> dict[str, Any]:
    """What a config.json says of ties, by the part that says it."""

    def entries(part: Mapping[str, Any], path: str) -> dict[str, Any]:
        inner = [entries(value, f"{path}{key}.") for key, value in part.items() if isinstance(value, dict)]
        found = {path: part["tie_word_embeddings"]} if "tie_word_embeddings" in part else {}
        return found | {key: value for one in inner for key, value in one.items()}

    return {
        path: said for path, said in entries(json.loads((directory / "config.json").read_text()), "").items() if said
    }


@pytest.mark.parametrize("kind", KINDS)
def test_no_part_of_the_config_says_that_an_untied_head_is_tied(kind: str, tmp_path: Path) -> None:
    model = make_tiny(FAMILIES[kind])
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    head = model.get_output_embeddings()
    assert head.weight is model.get_input_embeddings().weight
    head.weight = nn.Parameter(head.weight.detach() + torch.randn_like(head.weight))
    for part in (model.config, model.config.get_text_config()):
        part.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "library")
    checkpoint = saved(model.state_dict(), tmp_path / "ck")
    (alias,) = [name for name, value in model.state_dict().items() if value.data_ptr() == head.weight.data_ptr()]
    to_hf(checkpoint, tmp_path / "bare", tmp_path / "by-config")
    to_hf(checkpoint, tmp_path / "base", tmp_path / "by-base", allow=("*lm_head.weight", alias))
    exports = [tmp_path / "by-config", tmp_path / "by-base"]
    exports += [export_live(model, tmp_path / base, tmp_path / f"live-{base}") for base in ("bare", "base")]
    for directory in exports:
        assert flags(directory) == flags(tmp_path / "library"), directory.name
        loaded, info = type(model).from_pretrained(directory, output_loading_info=True)
        assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
        state = loaded.state_dict()
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
