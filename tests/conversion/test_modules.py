"""A sentence encoder to start from: its transformer, as of every model, and what of it is left out is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from shardsmith.cli import main
from tests.dcp_directories import load
from tests.export.test_modules import DENSE, base

__all__ = ["base"]


def note_of(base: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["to-dcp", "--base-model", str(base), "--output-dir", str(output), "--json"]) == 0
    return str(json.loads(capsys.readouterr().out)["note"])


def test_modules_with_weights_are_named_as_left_out(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert "left out: 2_Dense, " in note_of(base, tmp_path / "ck", capsys)
    wanted = AutoModel.from_pretrained(base).state_dict()
    loaded = {name: torch.zeros_like(value) for name, value in wanted.items()}
    load(loaded, tmp_path / "ck")
    assert all(torch.equal(loaded[name], value) for name, value in wanted.items())
    (base / DENSE).unlink()
    capsys.readouterr()
    assert note_of(base, tmp_path / "other", capsys) == ""
