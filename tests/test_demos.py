"""The demos are run, as they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_demo_passes_all_its_checks(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples" / "demo.py", "--run", tmp_path / "run", "--steps", "60"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "15 of 15 checks passed" in found.stdout
    exports = {path.name for path in (tmp_path / "run" / "hf").iterdir()}
    assert exports - {".retention.json"} == {"step-60", "step-60-ema"}


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_demo_in_an_object_store_passes_all_its_checks(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples" / "demo_remote.py", "--run", tmp_path / "run", "--steps", "60"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "6 of 6 checks passed" in found.stdout
