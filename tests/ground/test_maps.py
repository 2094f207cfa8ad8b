"""A file that is cut off while a command reads it: a message that names it, and nothing half-done on disk."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.forked import run_python
from tests.trained_runs import Trained

# The reader of a command cuts its own file off at the first look: no other process could do it at a chosen time.
CUT_OFF = """
import os, sys
from shardsmith.cli import main
from shardsmith.ground.mapped import MappedFile
view = MappedFile.view
def cut_off_first(self, *place):
    if self.path.suffix == ".distcp":
        MappedFile.view = view
        os.truncate(self.path, 0)
    return view(self, *place)
MappedFile.view = cut_off_first
sys.exit(main(sys.argv[1:]))
"""


def commands(checkpoint: Path, base: Path, output: Path) -> dict[str, list[str]]:
    places = ["--base-model-path", str(base), "--output-dir", str(output), "--quiet"]
    return {
        "to-hf": ["to-hf", "--checkpoint-dir", str(checkpoint), *places, "--no-verify"],
        "verify": ["verify", str(checkpoint), str(checkpoint)],
    }


@pytest.mark.skipif(sys.platform != "linux", reason="siginfo_t is read as Linux lays it out")
@pytest.mark.parametrize("name", ["to-hf", "verify"])
def test_a_file_that_is_cut_off_under_a_command_is_named(
    trained: dict[tuple[str, int], Trained], name: str, tmp_path: Path
) -> None:
    run = trained["llama", 1]
    checkpoint = tmp_path / run.checkpoint.name
    checkpoint.mkdir()
    for path in run.checkpoint.iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    before = set(os.listdir(tmp_path))
    command = commands(checkpoint, run.base, tmp_path / "out")[name]
    ran = run_python("-c", CUT_OFF, *command)
    assert ran.returncode == 2, ran.stderr
    assert f"{checkpoint}/__0_0.distcp: cannot be read any more" in ran.stderr
    assert set(os.listdir(tmp_path)) == before
