"""Checkpoints of DeepSpeed are told by their names, with the command that makes weights of them.

The command was tried with the program of DeepSpeed 0.19.8, whose output is read.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardsmith.cli import main
from shardsmith.formats.by_path import TORCH, detect_checkpoint_format


@pytest.fixture
def run(tmp_path: Path) -> Path:
    step = tmp_path / "a run" / "global_step10"
    step.mkdir(parents=True)
    torch.save({"module": {"w": torch.ones(2)}}, step / "mp_rank_00_model_states.pt")
    torch.save({"module": {"w": torch.ones(0)}}, step / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    torch.save({"state": {"exp_avg": torch.ones(2)}}, step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (step.parent / "latest").write_text(step.name)
    return step.parent


@pytest.mark.parametrize("name", ["", "global_step10", *(f"global_step10/{one}" for one in ("zero_pp", "bf16"))])
@pytest.mark.parametrize("has_program", [True, False])
def test_what_makes_weights_of_it_is_said(
    name: str, has_program: bool, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = "-m deepspeed.utils.zero_to_fp32"
    if has_program:
        (run / "zero_to_fp32.py").touch()
        program = f"'{run / 'zero_to_fp32.py'}'"
    path = next(run.glob(f"{name}*.pt")) if "/" in name else run / name
    tag = " -t global_step10" if name else ""
    assert f"python {program} '{run}' WEIGHTS{tag} writes" in detect_checkpoint_format(path).reason
    command = ["to-hf", "--checkpoint", str(path), "--base-model", str(run), "--output-dir", str(run.parent / "out")]
    for given in (["detect", str(path)], ["inspect", str(path)], command):
        assert main(given) != 0
        said = capsys.readouterr()
        assert f"'{run}' WEIGHTS" in " ".join((said.out + said.err).split())


def test_whole_weights_of_a_rank_are_read(run: Path) -> None:
    assert detect_checkpoint_format(run / "global_step10" / "mp_rank_00_model_states.pt").name == TORCH
