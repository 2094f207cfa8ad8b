"""--average KEY takes any dict that holds tensors under the model's names, whatever it is called."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from shardsmith.cli import main
from tests.families.tiny import all_families, make_tiny

FAMILIES = {family.kind: family for family in all_families()}


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "GPT2LMHeadModel"])  # without ties, and with them
def test_a_dict_of_any_name_is_exported_as_the_average(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny(FAMILIES[kind])
    model.save_pretrained(tmp_path / "base")
    state = dict(model.state_dict())
    moved = {name: value + 1 for name, value in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: that there are no ranks
        dcp.save({"model": state, "teacher": {"net": moved}}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    given = ["--checkpoint_dir", tmp_path / "checkpoint", "--base_model_path", tmp_path / "base", "--dtype", "original"]
    command = ["to-hf", *given, "--output_dir", tmp_path / "out", "--average"]
    assert main([*map(str, command), "nobody"]) == 2
    assert "has no average 'nobody'; it holds teacher.net" in capsys.readouterr().err
    for models, beside in (((), True), (("--models", "ema"), False)):
        output = tmp_path / f"out-{beside}"
        command[command.index("--output_dir") + 1] = output
        assert main([*map(str, command), "teacher.net", *models]) == 0
        assert (output / "ema.safetensors").exists() == beside
    loaded = type(model).from_pretrained(output).state_dict()
    assert all(torch.equal(value, moved[name]) for name, value in loaded.items())
