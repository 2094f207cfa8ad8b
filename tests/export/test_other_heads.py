"""A head for another number of labels than the base model's: the advice leads to an export that is right."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shardsmith.cli import main
from tests.families.tiny import all_families, make_tiny

FAMILIES = {family.kind: family for family in all_families()}
KINDS = (
    "BertForSequenceClassification",
    "ElectraForTokenClassification",
    "ViTForImageClassification",
    "ASTForAudioClassification",
    "LlamaForSequenceClassification",
)


@pytest.mark.parametrize("kind", KINDS)
def test_the_advice_for_another_number_of_labels_leads_to_a_right_export(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_tiny(FAMILIES[kind])
    base.save_pretrained(tmp_path / "base")
    config = copy.deepcopy(base.config)
    config.num_labels = base.config.num_labels + 5
    model = type(base)(config).to(base.dtype)
    save_file({n: t.clone() for n, t in model.state_dict().items()}, tmp_path / "trained.safetensors")
    given = ["--checkpoint_dir", tmp_path / "trained.safetensors", "--base_model_path", tmp_path / "base"]
    command = ["to-hf", *given, "--output_dir", tmp_path / "out", "--dtype", "original"]
    assert main(list(map(str, command))) == 2
    said = capsys.readouterr().err
    assert f"id2label: {config.num_labels} labels instead of {base.config.num_labels}" in said
    allowed = [word for word in said.split("--allow ", 1)[1].split() if word.startswith("'")]
    assert main([*map(str, command), "--allow", *(word.strip(".'") for word in allowed)]) == 0
    loaded, info = type(base).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
    assert loaded.config.num_labels == config.num_labels
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
