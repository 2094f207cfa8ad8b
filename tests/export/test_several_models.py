"""A checkpoint with several dicts that each hold the whole model: which one is exported has to be said."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from shardsmith.cli import main
from tests.families.tiny import all_families, make_tiny


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "GPT2LMHeadModel"])  # without ties, and with them
def test_of_several_whole_models_one_is_exported_once_the_others_are_left_out(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny(next(family for family in all_families() if family.kind == kind))
    model.save_pretrained(tmp_path / "base")
    student = dict(model.state_dict())
    state = {"student": student, "teacher": {name: value + 1 for name, value in student.items()}, "seen": torch.ones(1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: that there are no ranks
        dcp.save(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    command = ["to-hf", "--checkpoint", str(tmp_path / "checkpoint"), "--base-model", str(tmp_path / "base")]
    command += ["--dtype", "original", "--output-dir", str(tmp_path / "out")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "Each of student, teacher holds all tensors of the base model" in error
    assert not (tmp_path / "out").exists()
    cure = error.rsplit("for student: ", 1)[1]
    assert main([*command, *cure.replace("'", "").split()]) == 0
    loaded = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(value, student[name]) for name, value in loaded.items())
