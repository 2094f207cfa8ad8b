"""BAGEL's 1223 names and shapes, planned, compared and dry-run without its bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import measure
from tests.full_size import specs, write_base, write_step


def test_a_dry_run_at_full_size_takes_little_memory(tmp_path: Path) -> None:
    write_step(tmp_path / "0000007")
    write_base(tmp_path / "BAGEL-7B-MoT")
    places = ["--checkpoint_dir", "0000007", "--output_dir", "hf", "--base_model_path", "BAGEL-7B-MoT"]
    command = [sys.executable, "-m", "shardsmith.cli", "to-hf", *places, "--models", "both", "--dry_run", "--json"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (planned,) = json.loads(ran.stdout)["directories"]
    assert planned["template"] == "ema.safetensors"
    assert [(m["tensors"], m["elements"]) for m in planned["models"]] == [(1223, 14_607_260_128)] * 2
    assert planned["bytes"] == 2 * 2 * 14_607_260_128
    assert not (tmp_path / "hf").exists()
    inside = f"import os; os.chdir({str(tmp_path)!r}); from shardsmith.cli import main; main({command[3:]!r})"
    assert measure([sys.executable, "-c", inside]).peak_bytes <= 500e6


def test_our_names_are_those_of_the_release() -> None:
    names = specs()
    assert len(names) == 1223
    assert sum(shape.numel() for shape in names.values()) == 14_607_260_128
    parts = [sum(name.startswith(part) for name in names) for part in ("language_model.", "vit_model.vision_model.")]
    assert parts == [788, 421]
