"""A script that configures no logging sees a line for each save; one that does sees it once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shardsmith.ground.logs import VERBOSITY
from tests.forked import run_python

SCRIPT = """
import sys
{before}
from torch import nn
from shardsmith.hooks import Hooks, ShardedSave, every
model = nn.Linear(3, 3)
hooks = Hooks(ShardedSave(sys.argv[1], model=model, when=every(1)))
{after}
hooks.step(1)
hooks.close()
"""
CONFIGURED = "import logging; logging.basicConfig(level=logging.INFO)"


@pytest.mark.parametrize(
    ("before", "after", "verbosity", "lines"),
    [("", "", "info", 1), (CONFIGURED, "", "info", 1), ("", CONFIGURED, "info", 1), ("", "", "warning", 0)],
)
def test_each_save_is_said_once(tmp_path: Path, before: str, after: str, verbosity: str, lines: int) -> None:
    script = SCRIPT.format(before=before, after=after)
    done = run_python("-c", script, tmp_path / "run", env={**os.environ, VERBOSITY: verbosity})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step-1: ") == lines, done.stderr
    assert lines == 0 or ("of which the training waited" in done.stderr and " kB in " in done.stderr)
