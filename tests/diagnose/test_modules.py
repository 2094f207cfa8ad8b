"""Diagnoses of a whole sentence encoder: its modules are compared with those of the base model's folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from shardsmith.cli import main
from tests.dcp_directories import save
from tests.export.test_modules import base, encoder

__all__ = ["base"]


def diagnose(checkpoint: Path, base: Path, level: str) -> int:
    return main(["diagnose", "--checkpoint", str(checkpoint), "--base-model", str(base), "--level", level])


def loaded(base: Path) -> dict[str, Tensor]:
    """What the base model holds, as ``encoder`` has made it."""
    assert base.is_dir()
    return {name: value.detach() for name, value in encoder().named_parameters()}


@pytest.mark.parametrize("level", ["structure", "values", "all"])
def test_a_good_one_has_no_finding(base: Path, tmp_path: Path, level: str) -> None:
    save(loaded(base), tmp_path / "ck")
    assert diagnose(tmp_path / "ck", base, level) == 0


@pytest.mark.parametrize("fault", ["missing", "no module", "shape", "values"])
def test_a_fault_in_a_module_is_found(
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    state = loaded(base)
    weight = state.pop("2.linear.weight")
    if fault == "no module":
        del state["2.linear.bias"]
    elif fault != "missing":
        state["2.linear.weight"] = weight[:3] if fault == "shape" else torch.randn_like(weight)
    save(state, tmp_path / "ck")
    assert diagnose(tmp_path / "ck", base, "values" if fault == "values" else "structure") == 1
    assert "linear.weight" in capsys.readouterr().out
